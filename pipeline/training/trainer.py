"""Training a student from caches, resumable to the bit.

One idea: a step is a pure function of (weights, moments, step number, rows of the plan). So a
checkpoint is those tensors and three integers, and any number of ranks takes the same steps:
`accumulate` microbatches over all of them, divided by the global count of each objective.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch

from stillroom.cache_schemas.errors import EXIT_INCOMPLETE, StillroomError, StudentError
from stillroom.cache_schemas.scrubbing import scrubbed
from stillroom.pipeline.config import Run, require
from stillroom.pipeline.data.packing import Position
from stillroom.pipeline.data.records import RecordSource
from stillroom.pipeline.student.places import is_model
from stillroom.pipeline.training.best import best_of_before, take_best
from stillroom.pipeline.training.card import check_card, write_card_anew
from stillroom.pipeline.training.checkpoint import (
    Best,
    TrainingState,
    moved_otherwise,
    set_moved,
    tensors_of,
    trainable,
)
from stillroom.pipeline.training.exporting import Export, form_of
from stillroom.pipeline.training.held_out import measured_by
from stillroom.pipeline.training.identity import check_identity, check_not_fewer
from stillroom.pipeline.training.lock import exclusive
from stillroom.pipeline.training.metrics import MetricsLog
from stillroom.pipeline.training.parallel import Parallel, whole
from stillroom.pipeline.training.result import (
    RESULT,
    TrainResult,
    finished,
    finished_facts,
    keep,
    name_own_initial,
)
from stillroom.pipeline.training.setup import Setup
from stillroom.pipeline.training.stepping import Progress


class Interrupted(StillroomError):
    """Training was asked to stop; it goes on from its checkpoint when started again."""

    exit_code = EXIT_INCOMPLETE


def train(
    run: Run,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    caches: Mapping[str, RecordSource] | None = None,
    on_note: Callable[[str], None] = lambda _: None,
    blocks_measured: Path | None = None,
) -> TrainResult:
    """Train the student of a run, or go on where it stopped, or return what is finished.

    Args:
        run: needs [student], [[objective]], [train]; [teacher] only for the very first start.
        on_progress: called after every logged step in the main process.
        stop: asked between steps; True makes a checkpoint and ends with `Interrupted`.
        caches: name -> opened cache in place of the locations in `[train]`; "" is the main one.
        on_note: called in the main process with what a person should know and need not put right.
        blocks_measured: directory where `[student] leave_out` keeps its passes and looks for those
            of runs that share it; None takes the run's own.

    Raises:
        Interrupted: stopped on request; the same call goes on.
        StillroomError: the run, the caches and the student do not fit, or the loss is not finite.
    """
    settings = require(run.train, "train", run.name)
    parallel = Parallel.start()
    try:
        with exclusive(run.path(), parallel):
            training = Training(run, settings, parallel, caches, on_note, blocks_measured)
            return training.run(on_progress, stop)
    finally:
        parallel.close()


class Training(Setup):
    """One process's part in one run."""

    measured_on = "held-out"
    """What `_heldout` measures on, in words."""

    def run(self, on_progress, stop) -> TrainResult:
        """From wherever the run stands to its end."""
        steps, form = self.settings.steps, form_of(self.settings)
        patience, chosen_by = self.settings.patience, self._chosen_by()
        done = finished(self.settings_run, steps, self.identity, form, chosen_by, patience)
        if done is not None:
            self.parallel.together(lambda: name_own_initial(self.settings_run))
            if done.steps < steps:
                self._note_early_end(done.steps, done.best_step)
            return done
        start = time.perf_counter()
        self.parallel.together(lambda: check_card(self.settings_run))
        self.build()
        state = self._resume()
        log = None
        if self.parallel.is_main:
            run, tracker = self.settings_run, self.settings.tracker
            config = scrubbed(run.model_dump(mode="json"))
            log = MetricsLog(run.path(), state.step, tracker, run.name, config)
        try:
            state = self._loop(state, log, on_progress, stop)
        finally:
            self.checkpoints.finish()
            if log is not None:
                log.close()
        return self._finish(state, time.perf_counter() - start)

    def _heldout(self, step: int) -> dict[str, float]:
        """Means of the objectives on the held-out sets, when it is time for them."""
        every = self.settings.evaluate_every
        if not every or (step % every and step != self.settings.steps):
            return {}
        measured = [self.stepper.measure(heldout) for heldout in self.named.heldout]
        return {name: value for means in measured for name, value in means.items()}

    def _resume(self) -> TrainingState:
        latest = self.checkpoints.latest()
        if latest is None:
            self._check_nothing_is_lost()
            return TrainingState(0, Position(), self.identity, best=Best(of=self._chosen_by()))
        tensors = tensors_of(self.distiller, self.optimizer, self.ema)
        state = self.checkpoints.load(latest, tensors)
        check_identity(state.identity, self.identity, str(latest))
        set_moved(self.distiller, self.optimizer, state)
        check_not_fewer(state.step, self.settings.steps, str(latest))
        of = self._chosen_by()
        best = best_of_before(state, self.settings, self.checkpoints, of, self._note)
        return replace(state, best=best)

    def _chosen_by(self) -> str:
        """What `keep_best` measures, and on what."""
        wanted = self.settings.keep_best
        return measured_by(wanted, self.named.heldout) if wanted else ""

    def _check_nothing_is_lost(self) -> None:
        """A finished run whose checkpoints are gone cannot go on."""
        told = finished_facts(self.settings_run)
        if told is not None:
            raise StudentError(
                f"the run is at step {told['steps']}, and its checkpoints are gone",
                where=str(self.checkpoints.directory),
                remedy=self._way_on(self.settings_run.path("student")),
            )

    def _way_on(self, student: Path) -> str:
        anew = f"delete {self.settings_run.path(RESULT)} to train from the first step"
        if not is_model(student):
            return f"Its student is gone too: {anew}."
        return (
            f"Start another run from its student ([student] init = 'model' and model = "
            f"'{student}'), or {anew}."
        )

    def _loop(self, state: TrainingState, log, on_progress, stop) -> TrainingState:
        settings = self.settings
        if self._weary(state.best):  # it ended so, and is asked for its student again
            self._note_early_end(state.step, state.best.step)
            return state
        steps = self.loader.steps(state.position, settings.steps - state.step)
        for number in range(state.step, settings.steps):
            began = time.perf_counter()
            batches, after = next(steps)
            waited = time.perf_counter() - began  # seconds
            done = self.stepper.step(number, batches, stop())
            if done is None:
                self._save(state)
                self.checkpoints.finish()
                raise Interrupted(
                    f"stopped after step {number} of {settings.steps}",
                    remedy="Run the same command again to go on.",
                )
            tokens = state.tokens + done.tokens
            heldout = self._heldout(number + 1)
            best = self._best(state.best, heldout, number + 1)
            state = TrainingState(number + 1, after, self.identity, tokens, done.loss, best)
            if log is not None and (heldout or (number + 1) % settings.log_every == 0):
                seconds = time.perf_counter() - began
                report = Progress.of(
                    number, settings, done, waited, seconds, heldout, self.measured_on
                )
                log.write(report.step, report.flat())
                if on_progress is not None:
                    on_progress(report)
            weary = self._weary(best)
            last = weary or number + 1 == settings.steps
            if last or best.step == number + 1 or (number + 1) % settings.checkpoint_every == 0:
                self._save(state)
            if weary:
                self._note_early_end(number + 1, best.step)
                break
        return state

    def _best(self, best: Best, heldout: dict[str, float], step: int) -> Best:
        wanted = self.settings.keep_best
        return best.after(heldout[wanted], step) if wanted and heldout else best

    def _weary(self, best: Best) -> bool:
        return bool(self.settings.patience) and best.since >= self.settings.patience

    def _note_early_end(self, step: int, best_step: int) -> None:
        settings = self.settings
        self._note(
            f"no better {settings.keep_best} since step {best_step}: stopped at step {step} of "
            f"{settings.steps} (patience = {settings.patience}; with more, or 0, it goes on)"
        )

    def _save(self, state: TrainingState) -> None:
        moved = moved_otherwise(self.distiller, self.optimizer, state.step)
        tensors = tensors_of(self.distiller, self.optimizer, self.ema)
        self.checkpoints.save(replace(state, moved=moved), tensors)

    def _finish(self, state: TrainingState, seconds: float) -> TrainResult:
        """Export the student and say so; files are written by the main process."""
        student = self.settings_run.path("student")
        best = state.best.step if self.settings.keep_best else 0
        if best not in (0, state.step):
            tensors = tensors_of(self.distiller, self.optimizer, self.ema)
            take_best(best, state.step, self.settings, self.checkpoints, tensors)
        self.optimizer.state.clear()  # it is in the checkpoint; its room is for the export's check
        weights = self.ema or {name: p.detach() for name, p in trainable(self.distiller)}
        full = {name: whole(tensor) for name, tensor in weights.items()}
        loss = math.nan if state.loss is None else state.loss
        result = TrainResult(
            str(student), str(self.initial), state.step, loss, state.tokens, seconds, best
        )
        return self.parallel.together(lambda: self._leave(result, full))

    def _leave(self, result: TrainResult, weights: dict[str, torch.Tensor]) -> TrainResult:
        """Write and check the student, then say that the run is finished."""
        settings = self.settings
        assert self.proof is not None
        export = Export(
            self.initial, settings, weights, self.make, self.proof, self.parallel.device
        )
        whole_and_last = settings.parallel != "fsdp" and not self.ema
        live = self.distiller if whole_and_last else None
        check = export.write(Path(result.student), {"identity": self.identity}, live)
        result = replace(result, check=asdict(check))
        asked = settings.steps, self.identity, form_of(settings), self.teachers, self._chosen_by()
        keep(self.settings_run, result, *asked, patience=settings.patience)
        write_card_anew(self.settings_run)
        return result
