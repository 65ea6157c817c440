"""Capture of vision targets: once per image, resumable, measured, and honest about bad pictures."""

import hashlib
import json

import numpy as np
import pytest

from stillroom.cache_schemas.errors import CorpusError, PlanMismatch, TeacherError
from stillroom.cache_schemas.manifest import Manifest, read
from stillroom.cache_schemas.signals import IMAGE_ERROR
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.capture import images as vision_capture
from stillroom.pipeline.capture.images import capture_images, images_of
from stillroom.pipeline.config import Run
from stillroom.pipeline.corpus.preparing import Corpus
from stillroom.pipeline.encoders.engine import VisionEngine, image_example
from stillroom.pipeline.encoders.frozen import open_encoder
from stillroom.pipeline.images import decode_image
from stillroom.pipeline.teacher.protocol import RejectedExample
from tests import tiny_encoders
from tests.pictures import file, picture


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    return {kind: tiny_encoders.save(kind, root / kind) for kind in ("dinov2", "mask2former")}


@pytest.fixture
def prompts():
    """Seven prompts over five images; two of them share one, one prompt shows two."""
    files = [file(picture(seed)) for seed in range(5)]
    return [[files[0]], [files[1]], [files[0]], [files[2], files[1]], [files[3]], [], [files[4]]]


@pytest.fixture
def run(tmp_path, models, prompts):
    tiny_encoders.save_corpus(tmp_path / "run" / "corpus", prompts, heldout=1)
    return make_run(tmp_path / "run", models)


def make_run(directory, models, **more):
    dino = {"name": "dino", "kind": "dinov2", "model": str(models["dinov2"]), "size": 56}
    segments = {"name": "seg", "kind": "mask2former", "model": str(models["mask2former"])}
    encoders = [dino | {"codec": "int8"} | more, segments | {"size": 64, "codec": "fp16"}]
    vision = {"encoder": encoders, "images_per_shard": 2, "batch": 3}
    return Run(name="pictures", directory=str(directory), vision=vision)


def opened(run):
    return TeacherCache.open(run.path("vision"))


def test_every_image_is_seen_once_however_many_prompts_show_it(run, monkeypatch):
    seen = []
    monkeypatch.setattr(
        vision_capture.VisionEngine,
        "_bytes",
        lambda self, name, real=VisionEngine._bytes: seen.append(name) or real(self, name),
    )
    capture_images(run)
    assert len(seen) == len(set(seen)) == 5
    cache = opened(run)
    assert len(cache) == 5
    assert cache.index(["example_id"]).column(0).to_pylist() == list(
        images_of(Corpus.open(run.path("corpus")))
    )


def test_targets_are_the_encoders_to_within_the_stated_error(run, prompts):
    capture_images(run)
    cache = opened(run)
    encoders = {table.name: open_encoder(table) for table in run.vision.encoder}
    by_hash = {hashlib.sha256(f).hexdigest(): f for files in prompts for f in files}
    for record in cache:
        (span,) = record.example.images
        picture_seen = decode_image(by_hash[span.sha256], "")
        for column, name in enumerate(sorted(encoders)):
            encoder = encoders[name]
            wanted = encoder(encoder.preparation.pixels(picture_seen)[None])[0]
            found = record.signals[f"image.{name}"]
            assert found.shape == encoder.shape
            error = np.sum((found - wanted) ** 2) / np.sum(wanted**2)
            stated = record.signals[IMAGE_ERROR][column, 0]
            assert error == pytest.approx(stated, rel=0.02, abs=1e-9)
            assert error < 2e-4


def test_the_manifest_says_what_was_lost_by_storing(run):
    sealed = capture_images(run)
    cache = opened(run)
    assert set(sealed.stored_error) == {"image.dino", "image.seg"}
    for column, name in enumerate(sorted(sealed.stored_error)):
        errors = [float(record.signals[IMAGE_ERROR][column, 0]) for record in cache]
        assert sealed.stored_error[name].mean == pytest.approx(np.mean(errors), rel=1e-6)
        assert sealed.stored_error[name].largest == max(errors) > 0
    data = run.path("vision", "manifest.json").read_bytes()
    assert read(Manifest, data, "manifest.json") == sealed
    assert json.loads(data)["stored_error"]["image.dino"]["mean"] > 1e-9


def test_images_set_aside_do_not_count_as_stored_without_loss(run):
    everything = capture_images(run)
    names = images_of(Corpus.open(run.path("corpus")))
    errors = [record.signals[IMAGE_ERROR][0, 0] for record in opened(run)]
    (run.path("corpus") / "images" / names[1][:2] / names[1]).unlink()
    fewer = capture_images(run, on_error="quarantine", location=str(run.path("fewer")))
    assert len(everything.stored_error) == len(fewer.stored_error) == 2
    expected = np.mean(np.delete(errors, 1))
    assert fewer.stored_error["image.dino"].mean == pytest.approx(expected, rel=1e-6)


def test_any_number_of_workers_and_any_interruption_give_the_same_bytes(run, tmp_path, models):
    """Passes of as many images as a shard has: products of other sizes round in other ways."""
    vision = run.vision.model_copy(update={"batch": run.vision.images_per_shard})
    run = run.model_copy(update={"vision": vision})
    capture_images(run)
    other = str(tmp_path / "other")
    assert capture_images(run, rank=1, world_size=2, location=other) is None
    limit = iter(range(2))

    def interrupt(_progress):
        if next(limit, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture_images(run, location=other, on_progress=interrupt)
    manifest = capture_images(run, location=other)
    assert manifest is not None
    assert manifest.digest == opened(run).manifest.digest


def test_a_finished_capture_is_returned_and_another_encoder_refused(run, models):
    first = capture_images(run)
    assert capture_images(run, on_progress=lambda _: pytest.fail("worked again")) == first
    with pytest.raises(PlanMismatch, match=r"encoders\.dino\.layers"):
        capture_images(make_run(run.directory, models, layers=[2]))


def test_a_partial_cache_is_not_readable_and_says_how_to_go_on(run):
    from stillroom.cache_schemas.errors import CacheIncomplete

    assert capture_images(run, rank=0, world_size=2) is None
    with pytest.raises(CacheIncomplete):
        opened(run)


def test_an_image_that_is_gone_or_changed_stops_or_is_set_aside(run):
    names = images_of(Corpus.open(run.path("corpus")))
    gone, changed = names[1], names[3]
    (run.path("corpus") / "images" / gone[:2] / gone).unlink()
    path = run.path("corpus") / "images" / changed[:2] / changed
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RejectedExample, match="gone"):
        capture_images(run)
    capture_images(run, on_error="quarantine")
    lines = run.path("images", "rejects.jsonl").read_text().splitlines()
    rejected = {line["example_id"]: line["reason"] for line in map(json.loads, lines)}
    assert set(rejected) == {gone, changed}
    assert "gone" in rejected[gone]
    assert "bytes have changed" in rejected[changed]
    cache = opened(run)
    lengths = [len(record.signals["image.dino"]) for record in cache]
    assert lengths == [16, 0, 16, 0, 16]


def test_an_output_of_another_shape_than_the_plan_stops(run, monkeypatch):
    encoder = open_encoder(run.vision.encoder[0])
    assert encoder.shape == (16, 32)
    monkeypatch.setattr(encoder, "_features", lambda pixels: pixels.flatten(2)[:, :, :32])
    data = file(picture(0))
    engine = VisionEngine([encoder], lambda _: data)
    with pytest.raises(TeacherError, match=r"shape \[3, 32\].*expected \[16, 32\]"):
        next(engine.score([image_example(hashlib.sha256(data).hexdigest())]))
    engine.close()


def test_targets_that_are_not_finite_are_rejected(run, monkeypatch):
    encoder = open_encoder(run.vision.encoder[0])
    real = encoder._features
    monkeypatch.setattr(encoder, "_features", lambda pixels: real(pixels) * float("nan"))
    data = file(picture(0))
    engine = VisionEngine([encoder], lambda _: data)
    name = hashlib.sha256(data).hexdigest()
    with pytest.raises(RejectedExample, match=r"NaN or infinite values in image\.dino"):
        next(engine.score([image_example(name)]))
    rejected = []
    record = next(engine.score([image_example(name)], rejected.append))
    assert len(rejected) == 1
    assert record.signals["image.dino"].shape == (0, 32)
    engine.close()


def test_a_corpus_without_images_is_told_so(tmp_path, models):
    tiny_encoders.save_corpus(tmp_path / "run" / "corpus", [[], []])
    with pytest.raises(CorpusError, match="has no images"):
        capture_images(make_run(tmp_path / "run", models))


def test_grey_and_large_pictures_share_a_batch(tmp_path, models):
    files = [file(picture(0).convert("L")), file(picture(1, (640, 10))), file(picture(2))]
    tiny_encoders.save_corpus(tmp_path / "run" / "corpus", [[data] for data in files])
    run = make_run(tmp_path / "run", models)
    capture_images(run)
    assert [r.signals["image.seg"].shape for r in opened(run)] == [(4, 64)] * 3


def test_int8_and_steps_are_smaller_than_fp16(tmp_path, models, prompts):
    sizes = {}
    for codec in ("fp16", "int8", "step"):
        directory = tmp_path / codec
        tiny_encoders.save_corpus(directory / "corpus", prompts)
        run = make_run(directory, models, codec=codec)
        capture_images(run)
        sizes[codec] = sum(
            path.stat().st_size
            for path in run.path("vision", "dense", "image.dino").rglob("c/*/0/0")
        )
    assert sizes["int8"] < 0.8 * sizes["fp16"]
    assert sizes["step"] < 0.8 * sizes["fp16"]
