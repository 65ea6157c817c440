"""What vLLM was given to load, and what it makes of it: missing weights, adapters, remote code."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForSequenceClassification

from stillroom.cache_schemas.errors import TeacherError
from stillroom.pipeline.config import Capture, Teacher
from stillroom.pipeline.record import Example, content_id
from stillroom.pipeline.teacher.opening import open_engine
from stillroom.pipeline.teacher.vllm import starting
from stillroom.pipeline.teacher.vllm.engine import vllm_arguments
from tests import tiny_models
from tests.unit.test_checkpoints import LACKING, quantised_copy, without

pytestmark = pytest.mark.vllm
SIZES = {"max_num_batched_tokens": 64, "max_num_seqs": 4}
TABLE = Capture(k=8, tail_draws=0, hidden_layers=(2, "final"))


def examples(count: int) -> list[Example]:
    made = []
    for seed in range(count):
        ids = np.random.default_rng(seed).integers(0, 768, 20 + 30 * seed).astype(np.int32)
        made.append(Example(content_id(ids, ids >= 0), "document", "random", ids, ids >= 0))
    return made


def start(model: Path, **settings):
    teacher = Teacher(model=str(model), engine_args=SIZES, **settings)
    return open_engine("vllm", teacher, TABLE, max_tokens=128)


@pytest.mark.parametrize("kind", LACKING)
def test_a_checkpoint_that_lacks_weights_is_refused_before_vllm_starts(
    kind, tiny_llama, tmp_path, monkeypatch
):
    monkeypatch.setattr(starting, "_set_environment", lambda: pytest.fail("vLLM was started"))
    pattern, message = LACKING[kind]
    with pytest.raises(TeacherError, match=message):
        start(without(tiny_llama, tmp_path / "broken", pattern))


def test_what_vllm_did_not_load_is_found_in_its_own_memory(tiny_qwen3, tmp_path, monkeypatch):
    """Fused with two that are there, and left out of vLLM's own list of loaded names."""
    monkeypatch.setattr(starting, "read_names", lambda _: None)
    broken = without(tiny_qwen3, tmp_path / "broken", r"layers\.1\.self_attn\.k_proj")
    with pytest.raises(TeacherError, match=r"first model\.layers\.1\.self_attn\.qkv_proj\.weight"):
        start(broken)


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes"])
def test_a_quantised_directory_that_vllm_cannot_run_here_is_one_message(
    method, tiny_llama, tmp_path
):
    if torch.cuda.is_available():
        pytest.skip("it may run here")
    with pytest.raises(TeacherError) as refused:
        start(quantised_copy(tiny_llama, tmp_path / "model", method))
    assert str(refused.value).count("\n") == 0
    assert f"is quantised ({method}), and vLLM cannot run that" in str(refused.value)


def test_a_float32_checkpoint_is_float32_under_both_engines(tiny_llama):
    """vLLM's own "auto" would take 16 bits."""
    assert vllm_arguments(Teacher(model=str(tiny_llama)), 512, 64, 1.0)["dtype"] == ("float32")


ADAPTERS = {
    "all linear": {"targets": "all-linear"},
    "embeddings": {"targets": ("embed_tokens", "o_proj")},
    "ranks of their own": {
        "targets": ("q_proj", "down_proj"),
        "rank_pattern": {"down_proj": 9},
        "alpha_pattern": {"q_proj": 3},
        "use_rslora": True,
    },
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_both_engines_speak_through_the_adapter(kind, tiny_llama, tmp_path):
    adapter = tiny_models.save_adapter(tmp_path / "adapter", tiny_llama, **ADAPTERS[kind])
    settings = {"model": str(tiny_llama), "dtype": "float32"}
    asked = examples(3)
    plain, adapted = (
        open_engine("reference", Teacher(**settings, adapter=name), TABLE)
        for name in ("", str(adapter))
    )
    base, truth = list(plain.score(asked)), list(adapted.score(asked))
    engine = start(tiny_llama, dtype="float32", adapter=str(adapter))
    try:
        found = list(engine.score(asked))
    finally:
        engine.close()
    for ours, theirs, without_it in zip(found, truth, base, strict=True):
        for name in ("token_logprob", "lse", "topk_logprobs"):
            assert np.abs(ours.signals[name] - theirs.signals[name]).max() < 1e-4, name
        for name in ("hidden.2", "hidden.final"):
            wanted = theirs.signals[name]
            assert np.abs(ours.signals[name] - wanted).max() < 1e-4 * np.abs(wanted).max()
        moved = np.abs(theirs.signals["token_logprob"] - without_it.signals["token_logprob"])
        assert moved.max() > 0.1


UNSERVED = {
    "DoRA": ({"use_dora": True}, "DoRA"),
    "a head of its own": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "an adapted head": ({"targets": ("q_proj", "lm_head")}, "lm_head"),
}


@pytest.mark.parametrize("kind", UNSERVED)
def test_adapters_that_vllm_does_not_support_are_refused(kind, tiny_qwen3, tmp_path):
    settings, message = UNSERVED[kind]
    adapter = tiny_models.save_adapter(tmp_path / "adapter", tiny_qwen3, **settings)
    with pytest.raises(TeacherError, match=f"vLLM cannot apply this adapter.*{message}") as refused:
        start(tiny_qwen3, dtype="float32", adapter=str(adapter))
    assert "--engine reference" in str(refused.value)


def test_a_model_that_vllm_takes_for_a_classifier_is_a_message(tiny_llama, tmp_path):
    made = tmp_path / "model"
    whole = LlamaForSequenceClassification.from_pretrained(tiny_llama, num_labels=2)
    whole.save_pretrained(made)  # with the `score.weight` that its config.json asks for
    with pytest.raises(TeacherError, match=r"does not support generation.*--engine reference"):
        start(made)


def test_windows_shorter_than_the_engines_own_test(tiny_llama):
    engine = open_engine("vllm", Teacher(model=str(tiny_llama)), TABLE, max_tokens=8)
    try:
        ids = np.arange(5, 13, dtype=np.int32)
        (record,) = engine.score([Example(content_id(ids, ids > 0), "d", "s", ids, ids > 0)])
    finally:
        engine.close()
    assert len(record.signals["lse"]) == 7
