"""Training a student from caches, resumable to the bit.

One idea: a step is a pure function of (weights, moments, step number, rows of the plan). So a
checkpoint is those tensors and three integers, and any number of ranks takes the same steps:
`accumulate` microbatches over all of them, divided by the global count of each objective.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from stillroom.cache_schemas.errors import EXIT_INCOMPLETE, StillroomError
from stillroom.pipeline.config import Run, require
from stillroom.pipeline.config.training import Train
from stillroom.pipeline.data.loader import DistillLoader, RecordSource
from stillroom.pipeline.data.packing import Position
from stillroom.pipeline.objectives.combine import Distiller, signals_needed, terms_of
from stillroom.pipeline.student.llava import load_task_tokens
from stillroom.pipeline.student.lora import adapt
from stillroom.pipeline.student.model import export, initial_student, load
from stillroom.pipeline.student.states import blocks_of, check_documents_are_isolated
from stillroom.pipeline.student.teacher_head import FILE as HEAD_FILE
from stillroom.pipeline.student.teacher_head import keep_teacher_head, read_teacher_head
from stillroom.pipeline.training.checkpoint import (
    Checkpoints,
    TrainingState,
    check_identity,
    set_optimizer_step,
    tensors_of,
    trainable,
    write_durably,
)
from stillroom.pipeline.training.metrics import MetricsLog
from stillroom.pipeline.training.optimization import optimizer_of
from stillroom.pipeline.training.parallel import Parallel, whole
from stillroom.pipeline.training.run import (
    check_fit,
    facts_of,
    freeze,
    geometry_of,
    identity_of,
    open_caches,
    open_heldout,
    open_image_caches,
    pictures_of,
)
from stillroom.pipeline.training.stepping import Progress, Stepper

RESULT = "train.json"


class Interrupted(StillroomError):
    """Training was asked to stop; it goes on from its checkpoint when started again."""

    exit_code = EXIT_INCOMPLETE


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
    """

    student: str
    initial: str
    steps: int
    final_loss: float
    tokens: int
    seconds: float


def train(
    run: Run,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    caches: Mapping[str, RecordSource] | None = None,
) -> TrainResult:
    """Train the student of a run, or go on where it stopped, or return what is finished.

    Args:
        run: needs [student], [[objective]], [train]; [teacher] only for the very first start.
        on_progress: called after every logged step in the main process.
        stop: asked between steps; True makes a checkpoint and ends with `Interrupted`.
        caches: name -> opened cache in place of the locations in `[train]`; "" is the main one.

    Raises:
        Interrupted: stopped on request; the same call goes on.
        StillroomError: the run, the caches and the student do not fit, or the loss is not finite.
    """
    settings = require(run.train, "train", run.name)
    parallel = Parallel.start()
    try:
        opened = caches or open_caches(run, settings)
        return Training(run, settings, parallel, opened).run(on_progress, stop)
    finally:
        parallel.close()


@dataclass
class Training:
    """One process's part in one run."""

    settings_run: Run
    settings: Train
    parallel: Parallel
    caches: Mapping[str, Any]
    ema: dict[str, torch.Tensor] = field(default_factory=dict)
    heldout: DistillLoader | None = None

    def __post_init__(self):
        run, settings, parallel = self.settings_run, self.settings, self.parallel
        self.image_caches = open_image_caches(settings, self.caches)
        everything = {**self.caches, **self.image_caches}
        self.facts = {name: facts_of(cache) for name, cache in everything.items()}
        self.terms = terms_of(run.objective, self.facts)
        self.geometry = geometry_of(settings, self.caches[""], parallel)
        self.initial = run.path("student-initial")
        if parallel.is_main:
            initial_student(require(run.student, "student", run.name), run.teacher, self.initial)
        parallel.barrier()
        check_fit(self.initial, self.caches)
        self.identity = identity_of(run, settings, everything, self.initial)

    def run(self, on_progress, stop) -> TrainResult:
        """From wherever the run stands to its end."""
        done = self._finished()
        if done is not None:
            return done
        start = time.perf_counter()
        self.build()
        state = self._resume()
        log = None
        if self.parallel.is_main:
            name, tracker = self.settings_run.name, self.settings.tracker
            log = MetricsLog(self.settings_run.path(), state.step, tracker, name)
        try:
            state = self._loop(state, log, on_progress, stop)
        finally:
            self.checkpoints.finish()
            if log is not None:
                log.close()
        return self._finish(state, time.perf_counter() - start)

    def build(self) -> None:
        """Load the student and everything that trains it; the weights are the initial ones."""
        settings, parallel = self.settings, self.parallel
        torch.manual_seed(settings.seed)
        model = load(self.initial, settings.attention).to(parallel.device).train()
        check_documents_are_isolated(model, self.facts[""].vocab_size)
        if settings.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        freeze(model, settings.freeze)
        adapt(model, settings.lora)
        task_tokens = load_task_tokens(self.initial)
        self.distiller = Distiller(
            model, self.terms, settings.kernel, self._teacher_head(), task_tokens
        ).to(parallel.device)
        if settings.compile:
            for block in blocks_of(model):
                block.compile()
        self.module = parallel.wrap(self.distiller, settings)
        parameters = [parameter for _, parameter in trainable(self.distiller)]
        self.optimizer = optimizer_of(parameters, settings)
        if settings.ema:
            self.ema = {name: p.detach().clone() for name, p in trainable(self.distiller)}
        self.stepper = Stepper(
            settings, parallel, self.distiller, self.module, self.optimizer, list(self.ema.values())
        )
        self.checkpoints = Checkpoints(
            self.settings_run.path("checkpoints"),
            parallel,
            settings.keep_last,
            settings.async_checkpoint,
        )
        self.loader = self.make_loader(self.caches, settings.workers)

    def make_loader(self, caches: Mapping[str, RecordSource], workers: int) -> DistillLoader:
        """A loader over caches that hold what the objectives need."""
        signals = signals_needed(self.terms, self.facts)
        run, settings = self.settings_run, self.settings
        return DistillLoader(
            caches,
            signals,
            self.geometry,
            settings.seed,
            settings.shuffle_shards,
            workers,
            pin_memory=self.parallel.device.type == "cuda",
            pictures=pictures_of(run, settings, self.initial, self.image_caches, signals),
        )

    def _teacher_head(self) -> torch.Tensor | None:
        if not any(term.needs.teacher_head for term in self.terms):
            return None
        path, teacher = self.settings_run.path(HEAD_FILE), self.settings_run.teacher
        wanted = self.caches[""].plan.facts["teacher"]["weights_sha256"]
        if self.parallel.is_main:
            keep_teacher_head(teacher, wanted, path)
        self.parallel.barrier()
        return read_teacher_head(path).to(self.parallel.device)

    def _heldout(self, step: int) -> dict[str, float]:
        """Means of the objectives on the held-out cache, when it is time for them."""
        settings = self.settings
        if not settings.evaluate_every or step % settings.evaluate_every:
            return {}
        if self.heldout is None:
            self.heldout = self.make_loader(open_heldout(settings, self.caches[""]), 0)
        return self.stepper.measure(self.heldout, step / settings.steps)

    def _resume(self) -> TrainingState:
        latest = self.checkpoints.latest()
        if latest is None:
            return TrainingState(0, Position(), self.identity)
        tensors = tensors_of(self.distiller, self.optimizer, self.ema)
        state = self.checkpoints.load(latest, tensors)
        check_identity(state.identity, self.identity, str(latest))
        set_optimizer_step(self.optimizer, state.step)
        return state

    def _loop(self, state: TrainingState, log, on_progress, stop) -> TrainingState:
        settings = self.settings
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
            state = TrainingState(number + 1, after, self.identity, tokens, done.loss)
            heldout = self._heldout(number + 1)
            if log is not None and (heldout or (number + 1) % settings.log_every == 0):
                seconds = time.perf_counter() - began
                report = Progress.of(number, settings, done, waited, seconds, heldout)
                log.write(report.step, report.flat())
                if on_progress is not None:
                    on_progress(report)
            if (number + 1) % settings.checkpoint_every == 0 or number + 1 == settings.steps:
                self._save(state)
        return state

    def _save(self, state: TrainingState) -> None:
        self.checkpoints.save(state, tensors_of(self.distiller, self.optimizer, self.ema))

    def _finished(self) -> TrainResult | None:
        path = self.settings_run.path(RESULT)
        if not path.exists() or not self.settings_run.path("student", "config.json").exists():
            return None
        facts = json.loads(path.read_text())
        check_identity(facts.pop("identity"), self.identity, str(path))
        return TrainResult(**facts | {"seconds": 0.0})

    def _finish(self, state: TrainingState, seconds: float) -> TrainResult:
        """Export the student and say so; files are written by the main process."""
        student = self.settings_run.path("student")
        weights = self.ema or {name: p.detach() for name, p in trainable(self.distiller)}
        full = {name: whole(tensor) for name, tensor in weights.items()}
        loss = math.nan if state.loss is None else state.loss
        result = TrainResult(
            str(student), str(self.initial), state.step, loss, state.tokens, seconds
        )
        if self.parallel.is_main:
            model = self._assembled(full)
            tokens = self.distiller.task_tokens.embeddings()
            tokens = None if tokens is None else whole(tokens.detach()).cpu()
            export(model, student, self.initial, {"identity": self.identity}, tokens)
            facts = {name: getattr(result, name) for name in TrainResult.__slots__}
            text = json.dumps(facts | {"identity": self.identity}, indent=2) + "\n"
            write_durably(self.settings_run.path(RESULT), text)
        self.parallel.barrier()
        return result

    def _assembled(self, full: dict[str, torch.Tensor]) -> Any:
        """A plain model on the CPU with the trained weights, adapters merged."""
        model = load(self.initial)
        merge = adapt(model, self.settings.lora)
        named = dict(model.named_parameters())
        prefix = "model."
        with torch.no_grad():
            for name, tensor in full.items():
                if name.startswith(prefix):  # projectors and task queries stay behind
                    named[name.removeprefix(prefix)].copy_(tensor)
        return merge()
