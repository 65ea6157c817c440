"""Which step's student `keep_best` sends out, also where its checkpoint was lost.

One idea: a best student whose weights are gone is beaten by nothing, so the further steps are
compared among themselves; where there are no further steps, what can be done is said. Measuring is
`held_out`'s.
"""

from collections.abc import Callable

import torch

from stillroom.cache_schemas.errors import ConfigError, StudentError
from stillroom.pipeline.config.training import Train
from stillroom.pipeline.training.checkpoint import Best, Checkpoints, TrainingState


def best_of_before(
    state: TrainingState,
    settings: Train,
    checkpoints: Checkpoints,
    of: str,
    on_note: Callable[[str], None],
) -> Best:
    """What is to be beaten by a run that goes on: nothing yet where the measure, or its text, was
    another, and where the best student is gone.

    Args:
        state: of the newest checkpoint.
        settings: the [train] table.
        checkpoints: of the run.
        of: what `keep_best` measures, and on what; empty without it.
        on_note: called with what a person should know.

    Raises:
        ConfigError: no step was measured so, and none is left to be.
        StudentError: the best student is gone, and no step is left to take its place.
    """
    best = state.best.among(of)
    if not settings.keep_best:
        return best
    last = state.step == settings.steps
    if best.value is None:
        # Measurements that were all NaN were taken, and the last step's student went out.
        if last and not best.since:
            raise _never_measured(settings)
        if state.best.value is not None:
            on_note(f"keep_best is another measure now: compared from step {state.step} on")
        return best
    if checkpoints.holds(best.step):
        return best
    lost = _lost(best.step, "whose checkpoint is gone", state.step, settings, checkpoints)
    if last:
        raise lost
    on_note(f"{lost.found}: compared from step {state.step} on")
    return Best(of=of)


def take_best(
    step: int,
    done: int,
    settings: Train,
    checkpoints: Checkpoints,
    tensors: dict[str, torch.Tensor],
) -> None:
    """Fill `tensors` from the checkpoint of the best step.

    Args:
        step: the best one.
        done: steps taken.
        settings: the [train] table.
        checkpoints: of the run.
        tensors: everything that training changes, by name.

    Raises:
        StudentError: the checkpoint is damaged or gone.
    """
    try:
        checkpoints.load(checkpoints.of_step(step), tensors)
    except StudentError as error:
        raise _lost(step, f"and {error.found}", done, settings, checkpoints) from error


def _lost(
    step: int, how: str, done: int, settings: Train, checkpoints: Checkpoints
) -> StudentError:
    """The last checkpoint is whole, so a lost one alone keeps no training from going on."""
    checkpoint = checkpoints.of_step(step)
    begin = "Delete this checkpoint and set" if checkpoint.exists() else "Set"
    keys = "keep_best and patience" if settings.patience else "keep_best"
    return StudentError(
        f"the best student so far is of step {step}, {how}",
        where=str(checkpoint),
        remedy=f"{begin} steps above {done} (only the further ones are compared), or leave {keys} "
        "out to have the last step's student.",
    )


def _never_measured(settings: Train) -> ConfigError:
    return ConfigError(
        f"keep_best = '{settings.keep_best}' of a run whose {settings.steps} steps were taken "
        "without it",
        expected="a run that measures it while it trains, on these held-out caches",
        where="[train]",
        remedy="Put keep_best and the held-out caches back as they were, set steps higher "
        "(only the further ones are compared), or use another run directory.",
    )
