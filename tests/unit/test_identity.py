"""Identity is everything that changes an answer: configs key by key, files, arguments, plans."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stillroom.cache_schemas.errors import ConfigError, PlanMismatch, TeacherError
from stillroom.cache_schemas.plan import Plan
from stillroom.pipeline.cache.writer import CacheWriter
from stillroom.pipeline.config import Teacher
from stillroom.pipeline.config.strict import validate
from stillroom.pipeline.teacher.arguments import SPEED_AND_PLACEMENT, meaningful
from stillroom.pipeline.teacher.facts import dtype_of, teacher_facts
from stillroom.pipeline.teacher.identity import SILENT_KEYS, canonical_config, directory_facts
from tests import tiny_models

MODEL_TYPES = (
    "bloom",
    "cohere2",
    "deepseek_v3",
    "falcon",
    "falcon_h1",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "llama",
    "llava",
    "mamba2",
    "mixtral",
    "olmo2",
    "phi3",
    "qwen2_vl",
    "qwen3_moe",
    "smollm3",
)


def written_config(model_type: str) -> dict[str, Any]:
    """What transformers writes of a model type, and what older and other files say beside it."""
    from transformers import AutoConfig

    written = json.loads(AutoConfig.for_model(model_type).to_json_string(use_diff=False))
    other = {"torch_dtype": "bfloat16", "_name_or_path": "somewhere", "of_tomorrow": {"x": 1.5}}
    return (
        {"transformers_version": "5", "rope_theta": 1e4, "sliding_window": 4096} | written | other
    )


def changed(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return f"{value}-changed"


def keys_of(table: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every key of nested tables and lists, and every place in a list."""
    places = table.items() if isinstance(table, dict) else enumerate(table)
    for key, value in places:
        if isinstance(value, (dict, list)) and value:
            yield from keys_of(value, (*path, key))
        else:
            yield (*path, key)


def with_change(table: Any, path: tuple) -> Any:
    made = json.loads(json.dumps(table))
    inner = made
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = changed(inner[path[-1]])
    return made


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_key_of_a_config_changes_the_identity_or_is_on_the_list(model_type, tmp_path):
    path, config = tmp_path / "config.json", written_config(model_type)

    def identity(written: dict) -> str:
        path.write_text(json.dumps(written))
        return json.dumps(canonical_config(path, SILENT_KEYS), sort_keys=True, allow_nan=False)

    before, seen = identity(config), set()
    for key in keys_of(config):
        same = identity(with_change(config, key)) == before
        assert same == (not SILENT_KEYS.keys().isdisjoint(key)), key
        seen.update({key[0]} & SILENT_KEYS.keys() if same else ())
    assert seen == SILENT_KEYS.keys()
    assert all(len(reason) > 20 for reason in SILENT_KEYS.values())
    assert identity(dict(reversed(config.items()))) == before


def test_a_config_has_one_spelling(tmp_path):
    spellings = ('{"a": 1e4, "b": [Infinity, NaN]}', '{"b": [Infinity, NaN], "a": 10000}')
    found = []
    for number, text in enumerate(spellings):
        (path := tmp_path / f"{number}.json").write_text(text)
        found.append(canonical_config(path, SILENT_KEYS))
    assert found[0] == found[1] == {"a": 10000, "b": ["inf", "nan"]}


@pytest.fixture
def model(tiny_llama, tmp_path):
    """A copy of the tiny teacher that may be changed."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def facts(model: Path, **settings) -> dict[str, Any]:
    return teacher_facts(Teacher(model=str(model), **settings))


def test_half_a_cache_of_another_rope_is_another_plan(model):
    before = facts(model)
    path = model / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"rope_theta": 500.0, "rope_parameters": None}))
    after = facts(model)
    assert before["weights_sha256"] == after["weights_sha256"]
    assert before["config"] != after["config"]


def test_files_of_quantisation_and_code_are_identity(model):
    first = facts(model)
    assert "files" not in first
    (model / "hf_quant_config.json").write_text('{"bits": 4}')
    second = facts(model)
    assert second["files"] == {"hf_quant_config.json": {"bits": 4}}
    (model / "modeling_own.py").write_text("A = 1\n")
    assert facts(model) == second
    trusted = [directory_facts(model, True)]
    (model / "modeling_own.py").write_text("A = 2\n")
    trusted.append(directory_facts(model, True))
    assert trusted[0]["code_sha256"] != trusted[1]["code_sha256"]


def test_code_of_another_repository_is_refused(model):
    path = model / "config.json"
    config = json.loads(path.read_text()) | {"auto_map": {"AutoConfig": "org/repo--file.Config"}}
    path.write_text(json.dumps(config))
    with pytest.raises(TeacherError, match="another repository"):
        directory_facts(model, True)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_auto_is_the_dtype_of_the_files_where_the_config_says_none(stored, model):
    from safetensors.torch import load_file, save_file

    path = model / "model.safetensors"
    weights = {name: w.to(getattr(torch, stored)) for name, w in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        config.pop(key, None)
    (model / "config.json").write_text(json.dumps(config))
    assert dtype_of(Teacher(model=str(model))) == stored
    assert facts(model)["dtype"] == stored


CHANGING = ("hf_overrides", "max_model_len", "load_format", "attention_backend", "kv_cache_dtype")


def test_every_argument_that_is_not_speed_or_placement_is_identity(tiny_llama):
    counted = dict.fromkeys((*CHANGING, "of_tomorrow"), 1) | {"hf_overrides": {"rms_norm_eps": 0.5}}
    arguments = dict.fromkeys(SPEED_AND_PLACEMENT, 1) | counted
    assert meaningful(arguments) == counted
    assert facts(tiny_llama, engine_args=arguments)["engine_args"] == meaningful(arguments)


@pytest.mark.vllm
def test_speed_and_placement_are_arguments_of_vllm():
    from dataclasses import fields

    from vllm.engine.arg_utils import EngineArgs

    gone = {"max_num_partial_prefills", "swap_space"}  # of releases before
    assert SPEED_AND_PLACEMENT - {field.name for field in fields(EngineArgs)} == gone


@pytest.mark.parametrize("key", ["model", "dtype", "trust_remote_code", "enable_lora"])
def test_what_has_a_key_is_not_said_in_engine_args(key):
    with pytest.raises(ConfigError, match=rf"'{key}' is said by \[teacher\]"):
        validate(Teacher, {"model": "m", "engine_args": {key: "x"}}, "run.toml")


def test_random_weights_are_no_teacher():
    with pytest.raises(ConfigError, match="random numbers"):
        validate(Teacher, {"model": "m", "engine_args": {"load_format": "dummy"}}, "run.toml")


GOLDEN = Path(__file__).parents[1] / "golden" / "cache-v1" / "small" / "plan.json"


def test_a_plan_of_the_old_identity_is_read_and_says_which_facts_are_new(tiny_llama, tmp_path):
    old = Plan.from_bytes(GOLDEN.read_bytes())
    assert Plan.from_bytes(old.to_bytes()) == old
    now = Plan(old.facts | {"teacher": old.facts["teacher"] | facts(tiny_llama)})
    CacheWriter.open(tmp_path / "cache", old).begin()
    with pytest.raises(PlanMismatch) as refused:
        CacheWriter.open(tmp_path / "cache", now)
    message = str(refused.value)
    assert "teacher.config: not recorded there, expected a table of" in message
    assert "teacher.trust_remote_code: not recorded there, expected False" in message
    assert "only the one that began it can go on" in message
    assert "teacher.config.rope" not in message


def test_a_difference_names_the_key_of_the_config():
    made = Plan.from_bytes(GOLDEN.read_bytes())

    def of(theta: float) -> Plan:
        teacher = made.facts["teacher"] | {"config": {"rope_theta": theta, "text": {"a": [1]}}}
        return Plan(made.facts | {"teacher": teacher})

    assert of(500).differences(of(10000)) == [
        "teacher.config.rope_theta: found 10000, expected 500"
    ]


def test_an_adapter_is_identity(tiny_llama, tmp_path):
    first = facts(tiny_llama)
    assert "adapter" not in first
    made = []
    for seed in (0, 1):
        adapter = tiny_models.save_adapter(tmp_path / f"adapter-{seed}", tiny_llama, seed=seed)
        made.append(facts(tiny_llama, adapter=str(adapter))["adapter"])
    assert made[0]["config"] == made[1]["config"]
    assert made[0]["weights_sha256"] != made[1]["weights_sha256"]
    assert "base_model_name_or_path" not in made[0]["config"]
