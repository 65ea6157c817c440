"""A LLaVA-type student in OLA-VLM's two stages: targets from a real vision cache, tokens kept."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stillroom.cache_schemas.errors import ConfigError, StudentError
from stillroom.cache_schemas.manifest import Plan
from stillroom.pipeline.capture.images import capture_images
from stillroom.pipeline.config import parse
from stillroom.pipeline.corpus.preparing import Corpus
from stillroom.pipeline.corpus.tokenizer import tokenizer_facts
from stillroom.pipeline.record import TeacherRecord
from stillroom.pipeline.student.llava import TASK_TOKENS
from stillroom.pipeline.training.trainer import train
from tests import tiny_encoders, tiny_image_models
from tests.memory_cache import MemoryCache
from tests.pictures import file, picture

FROZEN = ["model.vision_tower.*", "model.language_model.*", "lm_head.*"]
EMBEDDING = {
    "name": "embedding",
    "cache": "vision",
    "weight": 0.5,
    "options": {"target": "dino", "layers": [1, 2], "seek": 4},
}
PLAIN = {"name": "cross_entropy"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A LLaVA directory, a corpus of eight pictures, their targets, and a cache of its texts."""
    root = tmp_path_factory.mktemp("world")
    llava = tiny_image_models.save("llava", root / "llava")
    dino = tiny_encoders.save("dinov2", root / "dino")
    files = [file(picture(seed)) for seed in range(8)]
    tiny_encoders.save_corpus(root / "run" / "corpus", [[data] for data in files])
    encoder = {"name": "dino", "kind": "dinov2", "model": str(dino), "size": 56, "grid": 2}
    document = {"name": "w", "directory": str(root / "run"), "vision": {"encoder": [encoder]}}
    capture_images(parse(document, "w"))
    return {"root": root, "llava": llava, "cache": texts(root / "run" / "corpus", llava)}


def texts(corpus, llava) -> MemoryCache:
    """Sixteen placeholders an image and random text; the rows hold nothing but their number."""
    from dataclasses import replace

    random, records = np.random.default_rng(0), []
    for example in Corpus.open(corpus).split("train"):
        tokens = random.integers(5, 700, 26).astype(np.int32)
        tokens[2:18] = 3
        span = replace(example.images[0], start=2, length=16)
        mask = np.arange(26) >= 20
        made = replace(example, token_ids=tokens, loss_mask=mask, images=(span,))
        rows = made.num_rows
        records.append(
            TeacherRecord(made, made.first_row, {"topk_ids": np.zeros((rows, 1), np.int32)})
        )
    return in_memory(records, llava)


def in_memory(records, llava) -> MemoryCache:
    """A cache of them."""
    plan = Plan.make(
        teacher={"vocab_size": 768, "hidden_size": 64},
        engine={"name": "none"},
        tokenizer=tokenizer_facts(str(llava)),
        corpus={"digest": "0" * 64},
        capture={"k": 1, "temperatures": [1.0], "examples_per_shard": 4, "profile": "exact"},
        num_examples=len(records),
        max_tokens=26,
        images=True,
        signals={"rows": ["topk_ids"], "dense": {}},
    )
    return MemoryCache(tuple(records), plan)


def run_of(world, name, objectives, student="", **settings):
    root = world["root"]
    document = {
        "name": name,
        "directory": str(root / name),
        "teacher": {"model": str(world["llava"])},
        "student": {"init": "model", "model": str(student or world["llava"])},
        "objective": objectives,
        "train": {
            "steps": 3,
            "batch_tokens": 64,
            "learning_rate": 1e-3,
            "workers": 0,
            "corpus": str(root / "run" / "corpus"),
            "images": {"vision": str(root / "run" / "vision")},
        }
        | settings,
    }
    return parse(document, name)


def trained(world, *arguments, **settings):
    run = run_of(world, *arguments, **settings)
    train(run, caches={"": world["cache"]})
    return run.path("student")


def weights(directory):
    return load_file(directory / "model.safetensors")


def test_two_stages(world):
    first = trained(world, "stage1", [PLAIN, EMBEDDING], freeze=FROZEN)
    before, after = weights(world["llava"]), weights(first)
    assert set(before) == set(after)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("multi_modal_projector" in name for name in moved)
    tokens = load_file(first / TASK_TOKENS)["task_tokens"]
    assert tokens.shape == (4, 64)

    second = trained(world, "stage2", [PLAIN], first, freeze=["model.vision_tower.*"])
    assert torch.equal(load_file(second / TASK_TOKENS)["task_tokens"], tokens)
    changed = weights(second)
    assert any(not torch.equal(changed[n], after[n]) for n in after if "language_model" in n)
    receipt = json.loads((world["root"] / "stage2" / "train.json").read_text())
    assert receipt["steps"] == 3
    with pytest.raises(StudentError, match="task tokens are frozen"):
        trained(world, "stage3", [PLAIN, EMBEDDING], first)


def test_frozen_tokens_are_seen_by_the_student(world):
    first = trained(world, "stage1", [PLAIN, EMBEDDING], freeze=FROZEN)
    with_tokens = trained(world, "with", [PLAIN], first)
    (first / TASK_TOKENS).rename(first / "aside")
    try:
        without = trained(world, "without", [PLAIN], first)
    finally:
        (first / "aside").rename(first / TASK_TOKENS)
    assert not (without / TASK_TOKENS).exists()
    a, b = weights(with_tokens), weights(without)
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_the_embedding_loss_falls(world):
    run = run_of(world, "falls", [EMBEDDING], steps=30, learning_rate=3e-3)
    seen = []
    caches = {"": world["cache"]}
    train(run, caches=caches, on_progress=lambda now: seen.append(now.loss))
    assert np.mean(seen[-5:]) < 0.8 * np.mean(seen[:5])


def test_a_layer_pruned_student_of_an_image_text_teacher(world):
    run = run_of(world, "pruned", [PLAIN])
    pruned = run.model_copy(
        update={"student": run.student.model_copy(update={"init": "prune_layers", "model": ""})}
    )
    train(pruned, caches={"": world["cache"]})
    config = json.loads((run.path("student") / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 1


def test_an_exported_student_is_read_by_transformers(world):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    student = trained(world, "stage1", [PLAIN, EMBEDDING], freeze=FROZEN)
    model, found = AutoModelForImageTextToText.from_pretrained(student, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert any("vision_tower.vision_model." in name for name in weights(student))
    processor = AutoProcessor.from_pretrained(student)
    made = processor(text=["<image> what"], images=[[picture()]], return_tensors="pt")
    assert model(**made).logits.shape[-1] == len(processor.tokenizer)


def test_a_model_from_parts_sees_with_its_tower_and_speaks_with_its_language_model(tmp_path):
    from transformers import AutoModelForCausalLM, CLIPVisionModel

    from stillroom.pipeline.student.llava_parts import assemble, save_processor
    from tests import tiny_models

    tower = tiny_encoders.save("clip", tmp_path / "tower")
    language = tiny_models.save_llama(tmp_path / "language")
    model = assemble(tower, language).eval()
    plain = AutoModelForCausalLM.from_pretrained(language).eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits)
        pixels = torch.randn(1, 3, 56, 56)
        wanted = CLIPVisionModel.from_pretrained(tower)(pixels, output_hidden_states=True)
        found = model.model.vision_tower(pixels, output_hidden_states=True)
        torch.testing.assert_close(found.hidden_states[-2], wanted.hidden_states[-2])
    model.save_pretrained(tmp_path / "made")
    save_processor(language, tower, model, tmp_path / "made")
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(tmp_path / "made")
    made = processor(text=["<image> x"], images=[[picture()]], return_tensors="pt")
    assert int((made["input_ids"] == model.config.image_token_id).sum()) == 16
    assert model(**made).logits.isfinite().all()


def test_parts_that_cannot_be_joined_are_refused(tmp_path):
    from stillroom.pipeline.student.llava_parts import assemble
    from tests import tiny_models

    dino = tiny_encoders.save("dinov2", tmp_path / "dino")
    language = tiny_models.save_llama(tmp_path / "language")
    with pytest.raises(StudentError, match=r"'dinov2' is not a vision tower.*CLIP or SigLIP"):
        assemble(dino, language)


def test_freezing_nothing_by_mistake_is_refused(world):
    with pytest.raises(ConfigError, match=r"'model.tower.\*' fits no weight"):
        trained(world, "typo", [PLAIN], freeze=["model.tower.*"])
    with pytest.raises(ConfigError, match="no cache 'vision'"):
        trained(world, "nocache", [EMBEDDING], images={})
