"""Which students a run compares, and that they are there.

One idea: a student that is missing is said before torch is imported and a teacher is loaded. It
loads none of them.
"""

from collections.abc import Mapping
from pathlib import Path

from stillroom.cache_schemas.errors import ConfigError, StudentError
from stillroom.pipeline.config import Run
from stillroom.pipeline.config.training import Evaluate
from stillroom.pipeline.student.places import is_model


def students_of(run: Run) -> dict[str, str]:
    """Label -> HF directory of every student that a run compares: those named in `[evaluate]`, and
    `before` and `after` training its own, if it has one.

    Raises:
        ConfigError: a student has the label of another model.
        StudentError: a directory is missing, or there is no student at all.
    """
    named = (run.evaluate or Evaluate()).students
    _check_labels(run, named)
    for label, directory in named.items():
        if not is_model(Path(directory)):
            raise StudentError(
                f"student '{label}' is not there",
                expected="a directory with config.json and weights",
                where=directory,
                remedy="Train it first, or correct [evaluate] students.",
            )
    return _own_students(run) | named if run.train is not None or not named else named


def _own_students(run: Run) -> dict[str, str]:
    """`before` and `after` training.

    Raises:
        StudentError: not trained yet.
    """
    own = {"before": run.path("student-initial"), "after": run.path("student")}
    missing = [directory for directory in own.values() if not is_model(directory)]
    if missing:
        raise StudentError(
            "this run has no trained student yet",
            expected="a directory with config.json and weights",
            where=str(missing[-1]),
            remedy="Run first, on the same run file: `stillroom run` (all stages) or, where the "
            "cache is there, `stillroom train`.",
        )
    return {label: str(directory) for label, directory in own.items()}


OWN_LABELS = ("before", "after", "student")
"""Of a run's own student, here and where it is compared by what others measure."""


def _check_labels(run: Run, named: Mapping[str, str]) -> None:
    """Refuse labels under which one model's figures would stand for another's."""
    taken = ("teacher", *OWN_LABELS) if run.train is not None else ("teacher",)
    for label in named:
        if label in taken:
            raise ConfigError(
                f"a student is called '{label}', as the run calls "
                f"{'the teacher' if label == 'teacher' else 'its own'}",
                where="[evaluate.students]",
                remedy="Give it another label.",
            )
