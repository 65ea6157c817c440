"""A model's way out: a plain HF directory that is there complete and right, or not at all.

One idea: it is written under another name, loaded again by whoever knows what it must be, and only
then put in place with one rename. What it must be is the caller's; trained weights are not here.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stillroom.cache_schemas.errors import StudentError, first_line
from stillroom.pipeline.student.llava import TASK_TOKENS
from stillroom.pipeline.student.llava_parts import name_for_vllm
from stillroom.pipeline.student.replacing import Replacing
from stillroom.pipeline.student.tokenizer_files import keep_tokenizer

RECEIPT, README = "student.json", "README.md"


def export(
    model: Any,
    directory: Path,
    tokenizer_from: Path,
    facts: dict,
    task_tokens: torch.Tensor | None = None,
    check: Callable[[Path], None] = lambda _: None,
) -> None:
    """Write a plain HF directory in one move.

    Args:
        model: a transformers model, or a PEFT model whose adapter is to be written.
        directory: where it goes, itself or as a link; what is there is replaced, but for its
            README.
        tokenizer_from: HF directory whose tokenizer the student keeps.
        facts: JSON kept as `student.json`.
        task_tokens: [count, D], kept beside a student that was trained with them.
        check: given what was written, before it is put in place; raises where it is wrong.

    Raises:
        StudentError: transformers does not write it, it cannot be put there, or `check` says so.
    """
    from safetensors.torch import save_file

    place = Replacing.of(directory)
    staging = place.staging
    _write_model(model, staging)
    (staging / README).unlink(missing_ok=True)  # PEFT's, with blanks to be filled in
    name_for_vllm(staging)
    if task_tokens is not None:
        save_file({"task_tokens": task_tokens.contiguous()}, staging / TASK_TOKENS)
    keep_tokenizer(tokenizer_from, staging)
    (staging / RECEIPT).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
    readable_as_others(staging)
    if (directory / README).exists():  # a person may have written on it
        shutil.copy2(directory / README, staging)
    try:
        check(staging)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    place.swap()


def _write_model(model: Any, staging: Path) -> None:
    from huggingface_hub.errors import StrictDataclassError

    try:
        model.save_pretrained(staging)
    except (StrictDataclassError, ValueError, TypeError, RuntimeError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise StudentError(
            f"transformers does not write this model ({first_line(error.__cause__ or error)})",
            where=str(staging.parent),
        ) from None


def readable_as_others(directory: Path) -> None:
    """Give every file of a directory the permissions that the umask gives new files; safetensors
    writes its own for the owner alone."""
    mode = (directory / RECEIPT).stat().st_mode
    for path in directory.iterdir():
        if path.is_file():
            path.chmod(mode & 0o777)
