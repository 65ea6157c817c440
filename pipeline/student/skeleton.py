"""A student without its weights: what its config alone can say.

One idea: a model made on the `meta` device has every module and every name and no memory, so
patterns, positions and sizes are known in a second, whatever the architecture and however large.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from stillroom.cache_schemas.errors import StudentError, first_line
from stillroom.pipeline.config import Teacher
from stillroom.pipeline.config.training import Student
from stillroom.pipeline.student.places import plain_model
from stillroom.pipeline.student.saving import RECEIPT
from stillroom.pipeline.student.states import decoder_of
from stillroom.pipeline.teacher.facts import model_directory

CHECK = "Check [student] model."
INVALID = "Put that right in its config.json, or name another [student] model."
SPARE_POSITIONS = 8
"""A table of positions may have a few rows more than the config's number (OPT has two)."""


def config_source(student: Student, teacher: Teacher | None, initial: Path) -> str | None:
    """Where the config of a run's student, or of what it is cut from, is read.

    Returns:
        None where a student is put together from parts, and where nothing names it.

    Raises:
        TeacherError: no such model.
        StudentError: no such config.
    """
    if (initial / RECEIPT).exists():
        return str(initial)
    if student.init == "parts":
        for part in filter(None, (student.model, student.vision_model)):
            config_of(part)
        return None
    if student.init == "config":
        return student.model or None
    if student.model:
        given = (teacher or Teacher(model="")).model_copy(update={"model": student.model})
        return str(model_directory(given.named_by("[student] model")))
    return str(model_directory(teacher)) if teacher else None


def skeleton(source: str) -> Any:
    """A model of a config, on the meta device.

    Raises:
        StudentError: the config is not there, or not one that transformers knows.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = config_of(source)
    sees = hasattr(config, "vision_config")
    kind: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            return kind.from_config(config)
    except Exception as error:  # whatever numbers that fit nothing make the libraries raise
        raise not_a_student(source, error) from None


def config_of(source: str) -> Any:
    """The config of a directory, a file, a hub id, or of the model that an adapter names.

    Raises:
        StudentError: it is not there, or not one that transformers knows.
    """
    from transformers import AutoConfig

    if source.endswith(".json") and not Path(source).is_file():
        raise StudentError("no such file", expected="a config", where=source, remedy=CHECK)
    try:
        return AutoConfig.from_pretrained(plain_model(source), trust_remote_code=False)
    except Exception as error:  # whatever a broken config makes the library raise
        raise not_a_student(source, error) from None


def not_a_student(source: str, error: Exception) -> StudentError:
    """A config from which transformers makes nothing, and why."""
    from huggingface_hub.errors import StrictDataclassError

    invalid = isinstance(error, StrictDataclassError)
    return StudentError(
        f"no student can be made of it ({first_line(error.__cause__ or error)})",
        expected="the config.json of a causal language model, or a directory that holds it",
        where=source,
        remedy=INVALID if invalid else CHECK,
    )


def positions_of(model: Any) -> tuple[int, bool]:
    """How many positions a student was made for, and whether there are no others.

    Returns:
        0 where its config does not say. True where positions come from a table: a later one does
        not exist. Where they are computed (RoPE) it does, and was never trained.
    """
    limit = int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0)
    decoder = decoder_of(model)
    words = model.get_input_embeddings()
    rows = [
        module.num_embeddings
        for module in decoder.modules()
        if isinstance(module, nn.Embedding) and module is not words
    ]
    rows += [size for buffer in decoder.buffers() if buffer.ndim > 1 for size in buffer.shape]
    return limit, bool(limit) and any(0 <= size - limit <= SPARE_POSITIONS for size in rows)
