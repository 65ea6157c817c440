"""Models from HF directories, as training and measurement want them.

One idea: everything that reads a student or a teacher through transformers goes through here, so an
adapter on disk becomes plain weights and a directory that does not load is one message. It makes
and saves nothing.
"""

import json
from pathlib import Path
from typing import Any

import torch

from stillroom.cache_schemas.errors import StudentError

ADAPTER = "adapter_config.json"
"""File by which PEFT and transformers know an adapter."""


def is_model(directory: Path) -> bool:
    """True where `load` finds a model or an adapter."""
    return any((directory / name).is_file() for name in ("config.json", ADAPTER))


def plain_model(directory: str | Path) -> str:
    """Where the config lies: in the directory, or in that of the model that its adapter names."""
    if not _is_adapter(directory):
        return str(directory)
    return json.loads((Path(directory) / ADAPTER).read_text())["base_model_name_or_path"]


def _is_adapter(directory: str | Path) -> bool:
    return (Path(directory) / ADAPTER).is_file()


def load(directory: str | Path, attention: str = "auto", dtype=torch.float32) -> Any:
    """A causal LM or image-text model from an HF directory, in training precision.

    An adapter (`[train.lora] export = "adapter"`) comes merged into the model that it names.

    Args:
        directory: the model's, or the adapter's.
        attention: transformers' name of an implementation, or `auto` for its own choice.
        dtype: of the weights.

    Raises:
        StudentError: the directory is missing or is not a model that transformers knows.
    """
    try:
        if _is_adapter(directory):
            return _with_adapter(Path(directory), attention, dtype)
        return _plain(directory, attention, dtype)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise StudentError(
            f"cannot be loaded ({reason(error)})",
            expected="an HF causal language model",
            where=str(directory),
            remedy="" if attention == "auto" else "Set [train] attention = 'auto'.",
        ) from None


def reason(error: BaseException) -> str:
    """The first line of an error that says something, or its name."""
    if "ignore_mismatched_sizes" in str(error):
        return "its weights have other shapes than its config says"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _plain(directory: str | Path, attention: str, dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    chosen = {} if attention == "auto" else {"attn_implementation": attention}
    sees = hasattr(AutoConfig.from_pretrained(directory), "vision_config")
    kind: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    return kind.from_pretrained(directory, dtype=dtype, **chosen)


def _with_adapter(directory: Path, attention: str, dtype) -> Any:
    from peft import PeftModel

    from stillroom.pipeline.student.lora import merged

    plain = _plain(plain_model(directory), attention, dtype)
    return merged(PeftModel.from_pretrained(plain, str(directory)))
