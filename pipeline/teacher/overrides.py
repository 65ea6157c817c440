"""What transformers makes of vLLM's engine arguments.

One idea: an argument is applied or refused. `hf_overrides` change a model's config under both
engines, in transformers through the config file, so that it reads old and new keys alike; what
vLLM alone can do is refused where transformers runs the model. It loads no model.
"""

import json
from pathlib import Path
from typing import Any

from stillroom.cache_schemas.errors import ConfigError, first_line
from stillroom.pipeline.config import Teacher
from stillroom.pipeline.teacher.arguments import meaningful

OF_VLLM_ALONE = frozenset(
    (
        "attention_backend",
        "attention_config",
        "enable_prefix_caching",
        "kernel_config",
        "linear_backend",
        "load_format",
        "logprobs_mode",
        "mamba_backend",
        "max_logprobs",
        "max_model_len",
        "moe_backend",
    )
)
"""How vLLM comes to its answers: another choice may change them, but not what the model means."""
OVERRIDES = "hf_overrides"
WHERE = "[teacher.engine_args]"


def check_applicable(teacher: Teacher) -> None:
    """Refuse what transformers cannot do and would change the answers.

    Raises:
        ConfigError: names the arguments.
    """
    beyond = sorted(meaningful(teacher.engine_args).keys() - OF_VLLM_ALONE - {OVERRIDES})
    if teacher.quantization:
        beyond.append("quantization")
    if beyond:
        raise ConfigError(
            f"the reference engine cannot apply {', '.join(beyond)}",
            expected="engine arguments that leave the answers alone, or hf_overrides",
            where=WHERE,
            remedy="Leave them out for this command, or use `--engine vllm` where there is one.",
        )


def overridden(config: Any, directory: Path, teacher: Teacher) -> Any:
    """The config that `hf_overrides` make of a model's own.

    Args:
        config: of the model, as transformers reads it.
        directory: where its config.json is.
        teacher: with the engine arguments.

    Raises:
        ConfigError: an override says nothing to transformers, or is none that it takes.
    """
    overrides = teacher.engine_args.get(OVERRIDES) or {}
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
    return _with(config, directory, overrides)


def _is_heard(config: Any, directory: Path, key: str, value: Any) -> bool:
    """Whether an override by itself changes what transformers knows of this model.

    Keys that a class does not know become attributes of the config, which say nothing.
    """
    before, after = (_with(config, directory, each).to_dict() for each in ({}, {key: value}))
    changed = {name for name in after if after[name] != before.get(name)}
    return before.get(key) == value or bool(changed - ({key} - before.keys()))


def _with(config: Any, directory: Path, overrides: dict) -> Any:
    written = json.loads((directory / "config.json").read_text())
    try:
        return type(config).from_dict(_merged(written, overrides))
    except Exception as error:  # whatever a class raises at values that it does not take
        reason = first_line(error)
        raise ConfigError(
            f"{type(config).__name__} does not take these ({reason})",
            where=f"{WHERE} hf_overrides",
            remedy="Use keys and values as the model's config.json has them.",
        ) from None


def _merged(written: dict, overrides: dict) -> dict:
    """Nested tables are merged, as vLLM does; everything else is replaced."""
    made = dict(written)
    for key, value in overrides.items():
        inner = made.get(key)
        both = isinstance(value, dict) and isinstance(inner, dict)
        made[key] = _merged(inner, value) if both else value  # type: ignore[arg-type]
    return made
