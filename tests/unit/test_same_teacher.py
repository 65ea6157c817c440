"""Two teachers are one only where everything that changes an answer is the same, wherever it is
asked: audit, evaluation, held-out caches, the kept head."""

import json
import shutil

import numpy as np
import pytest

from stillroom.cache_schemas.errors import ConfigError, PlanMismatch
from stillroom.cache_schemas.plan import Plan
from stillroom.pipeline.config import Capture, Run, Teacher
from stillroom.pipeline.evaluation import held_out
from stillroom.pipeline.evaluation.held_out import measure
from stillroom.pipeline.record import Example, content_id
from stillroom.pipeline.student.teacher_head import keep_teacher_head
from stillroom.pipeline.teacher.facts import teacher_facts
from stillroom.pipeline.teacher.sameness import SINCE_CONFIGS, check_same_teacher
from stillroom.stages.cache.compare import _check_teacher
from tests import tiny_models

OTHER_ROPE = {"hf_overrides": {"rope_parameters": {"rope_theta": 500.0}}}
MEANING = {
    "overrides": {"engine_args": OTHER_ROPE},
    "adapter": {"adapter": "{adapter}"},
    "config": {"model": "{other}"},
    "code": {"trust_remote_code": True},
}
RUNNING = {
    "quantization": {"quantization": "fp8"},
    "arguments": {"engine_args": {"kv_cache_dtype": "fp8"}},
    "dtype": {"dtype": "bfloat16"},
}
NOTHING = {
    "revision": {"revision": "main"},
    "speed": {"engine_args": {"max_num_seqs": 2}},
    "vllm's noise": {"engine_args": {"attention_backend": "TRITON_ATTN"}},
}


@pytest.fixture(scope="module")
def places(tiny_llama, tmp_path_factory):
    """An adapter, and the same weights under another config."""
    root = tmp_path_factory.mktemp("teachers")
    other = shutil.copytree(tiny_llama, root / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    adapter = tiny_models.save_adapter(root / "adapter", tiny_llama)
    return {"other": str(other), "adapter": str(adapter)}


@pytest.fixture
def changed(tiny_llama, places):
    """Facts of the teacher with something else said of it."""

    def facts(changes):
        named = {k: v.format(**places) if isinstance(v, str) else v for k, v in changes.items()}
        return teacher_facts(Teacher(**{"model": str(tiny_llama)} | named))

    return facts


def check(found, wanted, **more):
    return check_same_teacher(found, wanted, "here", "Do this.", **more)


@pytest.mark.parametrize("name", MEANING)
def test_what_a_model_means_always_counts(name, changed):
    for as_run in (True, False):
        with pytest.raises(PlanMismatch, match="is another teacher: ") as refused:
            check(changed(MEANING[name]), changed({}), as_run=as_run)
        assert str(refused.value).endswith("Do this.")


@pytest.mark.parametrize("name", RUNNING)
def test_how_it_is_run_counts_unless_it_is_said_not_to(name, changed):
    with pytest.raises(PlanMismatch):
        check(changed(RUNNING[name]), changed({}))
    assert check(changed(RUNNING[name]), changed({}), as_run=False) == []


@pytest.mark.parametrize("name", NOTHING)
def test_names_speed_and_noise_never_count(name, changed):
    assert check(changed(NOTHING[name]), changed({})) == []


def test_facts_of_an_earlier_release_are_named_and_not_guessed(changed):
    now = changed({})
    before = {key: value for key, value in now.items() if key not in SINCE_CONFIGS}
    assert check(now, before) == ["config", "trust_remote_code"]
    with pytest.raises(PlanMismatch, match="weights_sha256"):
        check(now, before | {"weights_sha256": "0" * 64})
    with pytest.raises(PlanMismatch, match="adapter"):
        check(changed(MEANING["adapter"]), before)


def test_a_strangers_facts_are_compared_whatever_they_are(changed):
    for strange in ({}, {"engine_args": [1]}, {"config": 3, "engine_args": {"a": None}}):
        with pytest.raises(PlanMismatch):
            check(changed({}), strange)


def test_an_audit_measures_how_a_teacher_is_run_and_compares_what_it_is(changed, tmp_path):
    plan = {"teacher": changed({}), "engine": {"name": "vllm"}}
    for name in MEANING:
        with pytest.raises(PlanMismatch):
            _check_teacher(plan, changed(MEANING[name]), "vllm", tmp_path)
    _check_teacher(plan, changed(RUNNING["dtype"]), "vllm", tmp_path)
    _check_teacher(plan, changed(RUNNING["quantization"]), "reference", tmp_path)
    with pytest.raises(PlanMismatch, match="quantization"):
        _check_teacher(plan, changed(RUNNING["quantization"]), "vllm", tmp_path)


def test_a_kept_head_is_of_the_whole_teacher(tiny_llama, changed, tmp_path):
    teacher = Teacher(model=str(tiny_llama))
    path = keep_teacher_head(teacher, changed({}), tmp_path / "head")
    keep_teacher_head(None, changed(RUNNING["dtype"]), path)
    with pytest.raises(PlanMismatch, match="hf_overrides"):
        keep_teacher_head(None, changed(MEANING["overrides"]), path)


def test_transformers_attention_is_identity_where_transformers_runs(tiny_llama):
    teacher = Teacher(model=str(tiny_llama), attention="sdpa")
    assert "attention" not in teacher_facts(teacher, "vllm")
    assert teacher_facts(teacher, "reference")["attention"] == "sdpa"


def test_evaluation_refuses_another_teacher_than_its_cache(tiny_llama, changed, tmp_path, plan):
    run = Run(name="run", directory=str(tmp_path), capture=Capture())
    (tmp_path / "cache").mkdir()
    kept = Plan(plan.facts | {"teacher": changed({})})
    (tmp_path / "cache" / "plan.json").write_bytes(kept.to_bytes())
    held_out._check_cache(run, Teacher(model=str(tiny_llama), dtype="bfloat16"))
    with pytest.raises(PlanMismatch, match="hf_overrides"):
        held_out._check_cache(run, Teacher(model=str(tiny_llama), engine_args=OTHER_ROPE))


def test_evaluation_applies_or_refuses_engine_arguments(tiny_llama):
    ids = np.arange(4, 24, dtype=np.int32)
    texts = [Example(content_id(ids, ids > 4), "document", "test", ids, ids > 4)]
    teacher = Teacher(model=str(tiny_llama), engine_args={"kv_cache_dtype": "fp8"})
    with pytest.raises(ConfigError, match="cannot apply kv_cache_dtype"):
        measure(teacher, {}, texts)
