"""What a finished run says of itself, in `train.json`.

One idea: a run is finished when its student is there, of the steps and in the form that are asked
for now; asked again it is read, not trained. It holds no weights.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stillroom.pipeline.config import Run
from stillroom.pipeline.student.places import ADAPTER, BASE, is_model
from stillroom.pipeline.training.checkpoint import write_durably
from stillroom.pipeline.training.identity import MEASURED, check_identity

RESULT = "train.json"
FORM_OF_BEFORE = {"form": "merged", "dtype": "float32"}
"""Of runs whose `train.json` does not say."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A finished run.

    Attributes:
        student: HF directory of the trained student.
        initial: HF directory of the untrained one.
        steps: steps taken in all; fewer than were asked for where `patience` ran out.
        final_loss: loss of the last step.
        tokens: trained on in all, on all ranks, without padding.
        seconds: of this process, this time; 0 when the run was finished before.
        best_step: whose weights were exported by `keep_best`, or by a recommender's `select_by`; 0
            where neither chooses.
        check: one batch's loss in training and of the exported student (see `exporting.Losses`).
    """

    student: str
    initial: str
    steps: int
    final_loss: float
    tokens: int
    seconds: float
    best_step: int = 0
    check: dict[str, float] = field(default_factory=dict)


def finished_facts(run: Run) -> dict[str, Any] | None:
    """What a run said of itself when it was finished last; None before that."""
    path = run.path(RESULT)
    return json.loads(path.read_text()) if path.exists() else None


def finished(
    run: Run, steps: int, identity: dict, form: dict, chosen_by: str = "", patience: int = 0
) -> TrainResult | None:
    """The result of a finished run; None where there is none, or none of these steps in this form,
    or where another patience may end it elsewhere.

    Args:
        run: the run.
        steps: that are asked for now.
        identity: of the run as it is asked for.
        form: of the export that is asked for.
        chosen_by: the held-out measure whose best student is asked for, and on what it is taken.
        patience: that is asked for.

    Raises:
        PlanMismatch: another run was finished there.
    """
    facts = finished_facts(run)
    if facts is None or not is_model(run.path("student")):
        return None
    found = facts.pop("identity")
    # What only a loaded student decides is as it was.
    decided = {key: found.get(key, before) for key, before in MEASURED.items()}
    check_identity(found, identity | decided, str(run.path(RESULT)))
    planned = facts.pop("planned", facts["steps"])
    if planned != steps or facts.pop("export", FORM_OF_BEFORE) != form:
        return None
    # Runs of before did not say by what; one that chose is taken for one that chose by this.
    of_before = chosen_by if facts.get("best_step") else ""
    if facts.pop("chosen_by", of_before) != chosen_by:
        return None
    if facts.pop("patience", None) != patience and facts["steps"] < steps:
        return None
    facts.pop("teachers", None)
    # A run that was moved or copied told another place; a recommender has no initial student.
    initial = str(run.path("student-initial")) if facts["initial"] else ""
    facts |= {"student": str(run.path("student")), "initial": initial, "seconds": 0.0}
    return TrainResult(**facts)


def name_own_initial(run: Run) -> None:
    """Let the adapter of a run that was moved or copied name the initial student beside it; one
    that a person gave another base, such as a published one, keeps it."""
    path, initial = run.path("student", ADAPTER), run.path("student-initial")
    if not path.exists():
        return
    facts = json.loads(path.read_text())
    named, own = Path(facts[BASE]), str(initial.resolve())
    if named.is_absolute() and named.name == Path(own).name and str(named) != own:
        write_durably(path, json.dumps(facts | {BASE: own}, indent=2, sort_keys=True))


def keep(
    run: Run,
    result: TrainResult,
    steps: int,
    identity: dict,
    form: dict,
    teachers: Sequence[dict] = (),
    chosen_by: str = "",
    patience: int = 0,
) -> None:
    """Say that a run of so many planned steps is finished, and who taught its student."""
    facts = {name: getattr(result, name) for name in TrainResult.__slots__}
    facts |= {"planned": steps, "identity": identity, "export": form, "chosen_by": chosen_by}
    facts |= {"teachers": list(teachers)} if teachers else {}
    facts |= {"patience": patience} if patience else {}
    write_durably(run.path(RESULT), json.dumps(facts, indent=2) + "\n")
