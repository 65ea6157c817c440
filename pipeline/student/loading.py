"""Models from HF directories, as training and measurement want them.

One idea: everything that reads a student or a teacher through transformers goes through here, so an
adapter on disk becomes plain weights and a directory that does not load is one message. It makes
and saves nothing.
"""

from pathlib import Path
from typing import Any

import torch

from stillroom.cache_schemas.errors import StudentError, first_line
from stillroom.pipeline.student.places import is_adapter, plain_model
from stillroom.pipeline.teacher.checkpoint import load_whole, unloadable
from stillroom.pipeline.teacher.identity import refuse_pickles


def load(
    directory: str | Path,
    attention: str = "auto",
    dtype: torch.dtype = torch.float32,
    trusts_code: bool = False,
    config: Any = None,
) -> Any:
    """A causal LM or image-text model from an HF directory, in training precision.

    An adapter (`[train.lora] export = "adapter"`) comes merged into the model that it names.

    Args:
        directory: the model's, or the adapter's.
        attention: transformers' name of an implementation, or `auto` for its own choice.
        dtype: of the weights.
        trusts_code: whether Python code of the directory may be run.
        config: in place of the directory's own.

    Raises:
        StudentError: the directory is missing, is not a model that transformers knows, or lacks
            weights.
    """
    try:
        if is_adapter(directory):
            return _with_adapter(Path(directory), attention, dtype)
        return _plain(directory, attention, dtype, trusts_code, config)
    except StudentError as error:
        if attention == "auto":
            raise
        raise _by_attention(error, attention) from None
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise StudentError(
            f"cannot be loaded ({first_line(error)})",
            expected="an HF causal language model",
            where=str(directory),
            remedy="" if attention == "auto" else "Set [train] attention = 'auto'.",
        ) from None


def _by_attention(error: StudentError, attention: str) -> StudentError:
    """The error of a load that named an attention, which may be what it comes from."""
    return StudentError(
        error.found,
        expected=error.expected,
        where=error.where,
        remedy=f"Set [train] attention = 'auto', or install what '{attention}' needs. Does 'auto' "
        f"fail too: {error.remedy or 'check the directory.'}",
    )


def _plain(
    directory: str | Path,
    attention: str,
    dtype: torch.dtype,
    trusts_code: bool = False,
    config: Any = None,
) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    try:
        config = config or AutoConfig.from_pretrained(directory, trust_remote_code=trusts_code)
    except Exception as error:  # whatever a broken config makes the library raise
        raise unloadable(directory, error, StudentError) from None
    kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    options = {"config": config, "dtype": dtype}
    if attention != "auto":
        options["attn_implementation"] = attention
    return load_whole(kind, directory, error=StudentError, trusts_code=trusts_code, **options)


def _with_adapter(directory: Path, attention: str, dtype) -> Any:
    from peft import PeftModel

    from stillroom.pipeline.student.lora import merged

    refuse_pickles(directory, StudentError)
    plain = _plain(plain_model(directory), attention, dtype)
    return merged(PeftModel.from_pretrained(plain, str(directory)))
