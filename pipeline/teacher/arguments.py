"""Engine arguments of a teacher: which change its answers, and what transformers makes of them.

One idea: an argument is applied or refused. `hf_overrides` change a model's config under both
engines, in transformers through the config file, so that it reads old and new keys alike; what
vLLM alone can do is refused where transformers runs the model. It loads no model.
"""

import json
from pathlib import Path
from typing import Any

from stillroom.cache_schemas.errors import ConfigError
from stillroom.pipeline.config import Teacher

SPEED_AND_PLACEMENT = frozenset(
    (
        "async_scheduling",
        "attention_backend",
        "block_size",
        "compilation_config",
        "cpu_offload_gb",
        "cudagraph_capture_sizes",
        "data_parallel_size",
        "disable_custom_all_reduce",
        "distributed_executor_backend",
        "download_dir",
        "enable_chunked_prefill",
        "enable_expert_parallel",
        "enforce_eager",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "load_format",
        "max_model_len",
        "max_num_batched_tokens",
        "max_num_partial_prefills",
        "max_num_seqs",
        "max_parallel_loading_workers",
        "pipeline_parallel_size",
        "ray_workers_use_nsight",
        "scheduling_policy",
        "swap_space",
        "tensor_parallel_size",
    )
)
"""vLLM engine arguments that do not change what the teacher says, noise apart."""

WHERE = "[teacher.engine_args]"


def check_applicable(teacher: Teacher) -> None:
    """Refuse what transformers cannot do and would change the answers.

    Raises:
        ConfigError: names the arguments.
    """
    beyond = sorted(teacher.engine_args.keys() - SPEED_AND_PLACEMENT - {"hf_overrides"})
    if teacher.quantization:
        beyond.append("quantization")
    if beyond:
        raise ConfigError(
            f"the reference engine cannot apply {', '.join(beyond)}",
            expected="engine arguments that leave the answers alone, or hf_overrides",
            where=WHERE,
            remedy="Leave them out for this command, or use `--engine vllm`.",
        )


def overridden(config: Any, directory: Path, teacher: Teacher) -> Any:
    """The config that `hf_overrides` make of a model's own.

    Args:
        config: of the model, as transformers reads it.
        directory: where its config.json is.
        teacher: with the engine arguments.

    Raises:
        ConfigError: an override says nothing to transformers.
    """
    overrides = teacher.engine_args.get("hf_overrides") or {}
    if not overrides:
        return config
    if not isinstance(overrides, dict):
        raise ConfigError("hf_overrides is not a table", where=f"{WHERE} hf_overrides")
    for key, value in overrides.items():
        if not _is_heard(config, directory, key, value):
            raise ConfigError(
                f"{key} = {value!r} changes nothing in {type(config).__name__}",
                where=f"{WHERE} hf_overrides",
                remedy="Use the key as the model's config.json has it (rope: `rope_parameters`).",
            )
    return type(config).from_dict(_merged(_written(directory), overrides))


def _is_heard(config: Any, directory: Path, key: str, value: Any) -> bool:
    """Whether an override by itself changes what transformers knows of this model.

    Keys that a class does not know become attributes of the config, which say nothing.
    """
    written = _written(directory)
    before, after = (
        type(config).from_dict(_merged(written, change)).to_dict() for change in ({}, {key: value})
    )
    changed = {name for name in after if after[name] != before.get(name)}
    return before.get(key) == value or bool(changed - ({key} - before.keys()))


def _written(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def _merged(written: dict, overrides: dict) -> dict:
    """Nested tables are merged, as vLLM does; everything else is replaced."""
    made = dict(written)
    for key, value in overrides.items():
        inner = made.get(key)
        both = isinstance(value, dict) and isinstance(inner, dict)
        made[key] = _merged(inner, value) if both else value  # type: ignore[arg-type]
    return made
