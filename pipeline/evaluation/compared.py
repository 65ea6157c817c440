"""The models that a measurement compares: the teacher, the student, and whatever stands beside it.

One idea: each is known by its label and loaded by itself, so that one at a time is in memory. The
student before training has nothing to say and is left out.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stillroom.cache_schemas.errors import ConfigError
from stillroom.pipeline.config import Evaluate, Run, Teacher, require
from stillroom.pipeline.evaluation.students import students_of
from stillroom.pipeline.student.places import ADAPTER, is_model, plain_model
from stillroom.pipeline.teacher.overrides import check_applicable
from stillroom.pipeline.teacher.reference.engine import load_merged

STUDENT = "student"
"""Label of the run's own trained student."""


def compared(run: Run) -> dict[str, Teacher]:
    """Label -> model, the teacher first, all in the arithmetic of `[evaluate] precision`.

    Raises:
        StudentError: a student is not there.
        ConfigError: the run has no teacher, or is about a recommender.
    """
    if run.recommender is not None:
        raise ConfigError(
            "a recommender answers no text", where=run.name, expected="a student of texts"
        )
    teacher = require(run.teacher, "teacher", run.name)
    check_applicable(teacher)
    precision = (run.evaluate or Evaluate()).precision
    students = {name: place for name, place in students_of(run).items() if name != "before"}
    students = {STUDENT if name == "after" else name: place for name, place in students.items()}
    own = {name: as_model(place) for name, place in students.items()}
    models = {"teacher": teacher, **own}
    return {name: one.model_copy(update={"dtype": precision}) for name, one in models.items()}


def as_model(directory: str) -> Teacher:
    """A student as the engines take a model; an adapter with what it belongs to."""
    place = Path(directory)
    adapter = str(place) if is_model(place) and (place / ADAPTER).is_file() else ""
    return Teacher(model=plain_model(place), adapter=adapter).named_by("[evaluate] students")


def loaded(models: dict[str, Teacher]) -> Iterator[tuple[str, Any]]:
    """Each model of transformers with its label, one after another."""
    for label, model in models.items():
        yield label, load_merged(model).eval()
