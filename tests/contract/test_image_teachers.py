"""Image-text teachers of five families: reference against transformers, vLLM against reference."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from stillroom.cache_schemas.errors import PlanMismatch, TeacherError
from stillroom.pipeline.cache.care.audit import audit
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.capture.cost import estimate
from stillroom.pipeline.capture.job import capture as run_capture
from stillroom.pipeline.capture.plan import pictures_of
from stillroom.pipeline.config import Capture, Prepare, Run, Source, Teacher
from stillroom.pipeline.corpus.preparing import prepare
from stillroom.pipeline.images import decode_image
from stillroom.pipeline.teacher.images import Pictures, collapsed
from stillroom.pipeline.teacher.opening import open_engine
from stillroom.pipeline.teacher.protocol import RejectedExample
from tests import tiny_image_models
from tests.tiny_image_models import FAMILIES

TABLE = Capture(
    k=8, temperatures=(0.5, 1.0, 2.0, 4.0), hidden_layers=(1, "final"), examples_per_shard=4
)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """family -> (model directory, corpus), made when first asked for."""
    root, made = tmp_path_factory.mktemp("image-text"), {}

    def world(family):
        if family not in made:
            model = tiny_image_models.save(family, root / family)
            made[family] = (model, _corpus(model, root / f"{family}-data"))
        return made[family]

    return world


def _corpus(model, directory):
    directory.mkdir()
    rows = []
    for number in range(5):
        for part in "ab":
            data = tiny_image_models.image(number * 2 + (part == "b"), 40 + 12 * number, 30)
            (directory / f"{part}{number}.png").write_bytes(data)
        rows.append(_row(number, ["<image>What is it?", "Say <image>and <image>now"][number % 2]))
    rows.append(_row(5, "No picture here."))
    (directory / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path, columns = str(directory / "rows.jsonl"), {"image_column": "images"}
    source = Source(name="s", kind="jsonl", path=path, messages_column="messages", **columns)
    return prepare(Prepare(source=(source,), heldout=0.0), str(model), directory / "corpus")


def _row(number, question):
    answer = {"role": "assistant", "content": f"It is number {number}, a house."}
    images = [f"a{number}.png", f"b{number}.png"][: question.count("<image>")]
    return {"messages": [{"role": "user", "content": question}, answer], "images": images}


def scored(engine, model, corpus, table=TABLE, examples=None):
    teacher = Teacher(model=str(model), dtype="float32")
    running = open_engine(engine, teacher, table, max_tokens=256, pictures=pictures_of(corpus))
    try:
        return list(running.score(examples or list(corpus.split("train"))))
    finally:
        running.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_says_what_the_model_says_of_the_processors_inputs(worlds, family):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, corpus = worlds(family)
    record = scored("reference", model, corpus, examples=[corpus.split("train")[1]])[0]
    example = record.example
    processor = AutoProcessor.from_pretrained(model)
    text = processor.apply_chat_template(
        [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Say "},
                    {"type": "image"},
                    {"type": "text", "text": "and "},
                    {"type": "image"},
                    {"type": "text", "text": "now"},
                ],
            },
            {"role": "assistant", "content": "It is number 1, a house."},
        ],
        tokenize=False,
    )
    pictures = [decode_image(corpus.image_bytes(i.sha256), "") for i in example.images]
    inputs = processor(text=[text], images=[pictures], return_tensors="pt")
    with torch.inference_mode():
        logits = AutoModelForImageTextToText.from_pretrained(model)(**inputs).logits[0]
    logprobs = logits.log_softmax(-1)[record.first_row : -1]
    best = logprobs.topk(8)
    # Two batches, two orders of summing: logits of size 4, each a sum of up to 256 terms in
    # float32, 4 * 256 * 2^-24. Another picture moves them by hundredths.
    np.testing.assert_allclose(record.signals["topk_logprobs"], best.values, atol=6e-5)
    assert inputs["input_ids"][0].tolist() == example.token_ids.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_picture_matters(worlds, family):
    model, corpus = worlds(family)
    example = corpus.split("train")[0]
    other = corpus.split("train")[2].images[0].sha256
    swapped = Pictures(lambda _: corpus.image_bytes(example.images[0].sha256))
    table = Capture(k=4)
    teacher = Teacher(model=str(model), dtype="float32")
    (one,) = open_engine("reference", teacher, table, pictures=swapped).score([example])
    recoloured = Pictures(lambda _: _inverted(corpus.image_bytes(example.images[0].sha256)))
    (two,) = open_engine("reference", teacher, table, pictures=recoloured).score([example])
    assert other != example.images[0].sha256
    assert np.abs(one.signals["token_logprob"] - two.signals["token_logprob"]).max() > 1e-3


def _inverted(data: bytes) -> bytes:
    import io

    from PIL import ImageOps

    stream = io.BytesIO()
    ImageOps.invert(decode_image(data, "")).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_agrees_with_reference(worlds, family):
    model, corpus = worlds(family)
    table = TABLE.model_copy(update={"score_images": True})
    examples = list(corpus.split("train"))
    span = examples[0].images[0]
    damaged = replace(examples[0], images=(replace(span, length=span.length + 1),))
    teacher = Teacher(model=str(model), dtype="float32")
    running = open_engine("vllm", teacher, table, max_tokens=256, pictures=pictures_of(corpus))
    rejected = []
    try:
        found = list(running.score([*examples, damaged], rejected.append))
    finally:
        running.close()
    expected = scored("reference", model, corpus, table)
    assert [error.example.example_id for error in rejected] == [damaged.example_id]
    for ours, truth in zip(found, expected, strict=False):
        assert ours.first_row == truth.first_row
        assert (ours.hidden_positions == truth.hidden_positions).all()
        for name in ("topk_logprobs", "token_logprob", "lse"):
            np.testing.assert_allclose(ours.signals[name], truth.signals[name], atol=1e-4)
        for name in ("hidden.1", "hidden.final"):
            difference = np.linalg.norm(ours.signals[name] - truth.signals[name])
            assert difference <= 1e-4 * np.linalg.norm(truth.signals[name])


def test_image_rows_are_scored_only_when_asked(worlds):
    model, corpus = worlds("llava")
    example = corpus.split("train")[0]
    plain = scored("reference", model, corpus, Capture(k=4), [example])[0]
    with_images = Capture(k=4, score_images=True)
    whole = scored("reference", model, corpus, with_images, [example])[0]
    span = example.images[0]
    assert plain.first_row == example.first_row >= span.start + span.length
    assert whole.first_row == span.start
    shared = plain.first_row - whole.first_row
    np.testing.assert_allclose(
        whole.signals["token_logprob"][shared:], plain.signals["token_logprob"], atol=1e-5
    )


def test_spans_travel_into_the_cache(worlds, tmp_path):
    model, corpus = worlds("llava")
    run = Run(
        name="r",
        directory=str(corpus.directory.parent),
        teacher=Teacher(model=str(model), dtype="float32"),
        capture=TABLE,
    )
    run_capture(run, engine="reference", location=str(tmp_path / "cache"))
    cache = TeacherCache.open(str(tmp_path / "cache"))
    assert [cache[i].example.images for i in range(len(cache))] == [
        example.images for example in corpus.split("train")
    ]
    assert cache.plan.facts["corpus"]["processor"] == corpus.facts["processor"]


def test_an_estimate_and_an_audit_look_at_the_pictures(worlds, tmp_path):
    model, corpus = worlds("llava")
    teacher = Teacher(model=str(model), dtype="float32")
    run = Run(name="r", directory=str(corpus.directory.parent), teacher=teacher, capture=TABLE)
    assert estimate(run, engine="reference").examples == len(corpus.split("train"))
    run_capture(run, engine="reference", location=str(tmp_path / "cache"))
    cache = TeacherCache.open(str(tmp_path / "cache"))

    def live(examples):
        return scored("reference", model, corpus, examples=examples)

    found = audit(cache, live, sample=3)
    assert found.passed
    assert found.live.kl_mean == 0
    blind = replace(cache[0].example, images=())
    (unseen,) = live([blind])
    assert not audit(cache, lambda asked: [unseen for _ in asked], sample=1).passed


BAD = {
    "missing": (FileNotFoundError(), "is missing"),
    "truncated": (tiny_image_models.image(1)[:90], "damaged or cut short"),
    "not an image": (b"<html>", "is not an image"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_image_gone_bad_after_preparation_is_one_rejected_example(worlds, case):
    model, corpus = worlds("llava")
    found, message = BAD[case]
    bad = corpus.split("train")[0].images[0].sha256

    def read(sha256):
        if sha256 != bad:
            return corpus.image_bytes(sha256)
        if isinstance(found, Exception):
            raise found
        return found

    teacher = Teacher(model=str(model), dtype="float32")
    engine = open_engine("reference", teacher, TABLE, pictures=Pictures(read))
    examples = [corpus.split("train")[i] for i in (0, 2)]
    rejected: list[RejectedExample] = []
    records = list(engine.score(examples, rejected.append))
    assert len(rejected) == 1
    assert message in str(rejected[0])
    assert [len(record.signals["token_logprob"]) > 0 for record in records] == [False, True]
    with pytest.raises(RejectedExample):
        list(engine.score(examples))


@pytest.mark.parametrize("family", FAMILIES)
def test_other_placeholders_than_prepared_are_a_rejected_example(worlds, family):
    model, corpus = worlds(family)
    example = corpus.split("train")[0]
    (span,) = example.images
    shorter = replace(example, images=(replace(span, length=max(span.length - 1, 0)),))
    with pytest.raises(RejectedExample, match="puts its images at"):
        scored("reference", model, corpus, examples=[shorter])


def test_a_text_teacher_rejects_examples_with_images(worlds, tiny_llama):
    _, corpus = worlds("llava")
    engine = open_engine("reference", Teacher(model=str(tiny_llama)), Capture(k=4))
    example = corpus.split("train")[0]
    fits = replace(example, token_ids=example.token_ids % 768)
    with pytest.raises(TeacherError, match="has images"):
        list(engine.score([fits]))


def test_another_processor_than_the_corpus_was_made_with_is_refused(worlds, tmp_path):
    import shutil

    model, corpus = worlds("llava")
    other = tmp_path / "other"
    shutil.copytree(model, other)
    settings = json.loads((other / "processor_config.json").read_text())
    settings["image_processor"]["image_mean"] = [0.1, 0.1, 0.1]
    (other / "processor_config.json").write_text(json.dumps(settings))
    teacher = Teacher(model=str(other), dtype="float32")
    run = Run(name="r", directory=str(corpus.directory.parent), teacher=teacher, capture=TABLE)
    with pytest.raises(PlanMismatch, match="image processor"):
        run_capture(run, engine="reference", location=str(tmp_path / "cache"))


def test_one_placeholder_stands_for_each_image_before_the_processor(worlds):
    _, corpus = worlds("llava")
    example = corpus.split("train")[1]
    tokens = collapsed(example, 3)
    assert tokens.count(3) == len(example.images) == 2
    grown = sum(span.length - 1 for span in example.images)
    assert len(tokens) == len(example.token_ids) - grown


def test_a_prefix_is_read_in_both_directions_and_the_answer_is_the_suffix(tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = tiny_image_models.save("paligemma", tmp_path / "model")
    (tmp_path / "a.png").write_bytes(tiny_image_models.image(1, 60, 40))
    messages = [
        {"role": "user", "content": "<image>what is it?"},
        {"role": "assistant", "content": "a red house"},
    ]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages, "images": "a.png"}))
    columns = {"messages_column": "messages", "image_column": "images"}
    source = Source(name="s", kind="jsonl", path=str(tmp_path / "rows.jsonl"), **columns)
    corpus = prepare(Prepare(source=(source,), heldout=0.0), str(model), tmp_path / "corpus")
    (example,) = corpus.split("train")
    processor = AutoProcessor.from_pretrained(model)
    assert processor.decode(example.token_ids[example.loss_mask]) == "a red house<|im_end|>"
    (span,) = example.images
    assert (span.start, span.length) == (0, 16)
    record = scored("reference", model, corpus)[0]
    inputs = processor(
        text=["<image>what is it?"],
        images=[[decode_image((tmp_path / "a.png").read_bytes(), "")]],
        suffix=["a red house"],
        return_tensors="pt",
    )
    inputs.pop("labels")
    assert inputs["input_ids"][0].tolist() == example.token_ids.tolist()
    loaded = AutoModelForImageTextToText.from_pretrained(model)
    with torch.inference_mode():
        logits = loaded(**inputs).logits[0]
        inputs.pop("token_type_ids")
        causal = loaded(**inputs).logits[0]
    best, other = (
        z.log_softmax(-1)[record.first_row : -1].topk(8).values for z in (logits, causal)
    )
    np.testing.assert_allclose(record.signals["topk_logprobs"], best, atol=1e-5)
    assert np.abs(other.numpy() - best.numpy()).max() > 1e-3
    with pytest.raises(TeacherError, match="both directions"):
        open_engine("vllm", Teacher(model=str(model)), Capture(k=4), pictures=pictures_of(corpus))
