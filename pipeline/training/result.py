"""What a finished run says of itself, in `train.json`.

One idea: a run is finished when its student is there in the form that is asked for now; asked again
it is read, not trained. It holds no weights.
"""

import json
from dataclasses import dataclass, field

from stillroom.pipeline.config import Run
from stillroom.pipeline.student.loading import is_model
from stillroom.pipeline.training.checkpoint import check_identity, write_durably

RESULT = "train.json"
FORM_OF_BEFORE = {"form": "merged", "dtype": "float32"}
"""Of runs whose `train.json` does not say."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A finished run.

    Attributes:
        student: HF directory of the trained student.
        initial: HF directory of the untrained one.
        steps: steps taken in all.
        final_loss: loss of the last step.
        tokens: trained on in all, on all ranks, without padding.
        seconds: of this process, this time; 0 when the run was finished before.
        check: one batch's loss in training and of the exported student (see `exporting.Losses`).
    """

    student: str
    initial: str
    steps: int
    final_loss: float
    tokens: int
    seconds: float
    check: dict[str, float] = field(default_factory=dict)


def finished(run: Run, identity: dict, form: dict) -> TrainResult | None:
    """The result of a finished run; None where there is none, or none in this form.

    Raises:
        PlanMismatch: another run was finished there.
    """
    path = run.path(RESULT)
    if not path.exists() or not is_model(run.path("student")):
        return None
    facts = json.loads(path.read_text())
    check_identity(facts.pop("identity"), identity, str(path))
    if facts.pop("export", FORM_OF_BEFORE) != form:
        return None
    return TrainResult(**facts | {"seconds": 0.0})


def keep(run: Run, result: TrainResult, identity: dict, form: dict) -> None:
    """Say that a run is finished."""
    facts = {name: getattr(result, name) for name in TrainResult.__slots__}
    facts |= {"identity": identity, "export": form}
    write_durably(run.path(RESULT), json.dumps(facts, indent=2) + "\n")
