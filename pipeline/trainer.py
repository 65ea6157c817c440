"""Training a student from caches, resumable to the bit.

One idea: a step is a pure function of (weights, moments, step number, rows of the plan). So a
checkpoint is those tensors and three integers, and any number of ranks takes the same steps:
`accumulate` microbatches over all of them, divided by the global count of each objective.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from cache_schemas.errors import EXIT_INCOMPLETE, StillroomError, StudentError
from pipeline.checkpoint import (
    Checkpoints,
    TrainingState,
    check_identity,
    set_optimizer_step,
    tensors_of,
    trainable,
    write_durably,
)
from pipeline.config import Run, require
from pipeline.data.batch import DistillBatch
from pipeline.data.loader import DistillLoader, RecordSource
from pipeline.data.packing import Position
from pipeline.lora import adapt
from pipeline.metrics import MetricsLog
from pipeline.objectives.combine import Distiller, signals_needed, terms_of
from pipeline.optimization import optimizer_of, rate
from pipeline.parallel import Parallel, accumulating, whole
from pipeline.student import export, initial_student, load
from pipeline.student_states import blocks_of, check_documents_are_isolated
from pipeline.training_run import (
    check_fit,
    facts_of,
    freeze,
    geometry_of,
    identity_of,
    open_caches,
    open_image_caches,
    pictures_of,
)
from pipeline.training_tables import Train
from pipeline.vision.student import load_task_tokens

RESULT = "train.json"


class Interrupted(StillroomError):
    """Training was asked to stop; it goes on from its checkpoint when started again."""

    exit_code = EXIT_INCOMPLETE


@dataclass(frozen=True, slots=True)
class Progress:
    """What a finished step tells whoever watches.

    Attributes:
        step: steps done.
        steps: steps of the run.
        loss: weighted sum of the objectives.
        values: objective label -> its mean, before its weight.
        learning_rate: of this step.
        gradient_norm: before clipping.
        tokens_per_second: over this step, all ranks, without padding.
        data_wait_share: share of this step spent waiting for data, this rank.
    """

    step: int
    steps: int
    loss: float
    values: dict[str, float]
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    data_wait_share: float


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A finished run.

    Attributes:
        student: HF directory of the trained student.
        initial: HF directory of the untrained one.
        steps: steps taken in all.
        final_loss: loss of the last step.
        tokens: tokens trained on, without padding.
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
        return _Training(run, settings, parallel, opened).run(on_progress, stop)
    finally:
        parallel.close()


@dataclass
class _Training:
    """One process's part in one run."""

    settings_run: Run
    settings: Train
    parallel: Parallel
    caches: Mapping[str, RecordSource]
    tokens: int = 0
    ema: dict[str, torch.Tensor] = field(default_factory=dict)

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
        self._build()
        state = self._resume()
        log = None
        if self.parallel.is_main:
            name, tracker = self.settings_run.name, self.settings.tracker
            log = MetricsLog(self.settings_run.path(), state.step, tracker, name)
        try:
            loss = self._loop(state, log, on_progress, stop)
        finally:
            self.checkpoints.finish()
            if log is not None:
                log.close()
        return self._finish(loss, time.perf_counter() - start)

    def _build(self) -> None:
        run, settings, parallel = self.settings_run, self.settings, self.parallel
        torch.manual_seed(settings.seed)
        model = load(self.initial, settings.attention).to(parallel.device).train()
        check_documents_are_isolated(model, self.facts[""].vocab_size)
        if settings.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        freeze(model, settings.freeze)
        adapt(model, settings.lora)
        task_tokens = load_task_tokens(self.initial)
        self.distiller = Distiller(model, self.terms, settings.kernel, task_tokens=task_tokens).to(
            parallel.device
        )
        if settings.compile:
            for block in blocks_of(model):
                block.compile()
        self.module = parallel.wrap(self.distiller, settings)
        self.parameters = [parameter for _, parameter in trainable(self.distiller)]
        self.optimizer = optimizer_of(self.parameters, settings)
        if settings.ema:
            self.ema = {name: p.detach().clone() for name, p in trainable(self.distiller)}
        self.checkpoints = Checkpoints(
            self.settings_run.path("checkpoints"),
            parallel,
            settings.keep_last,
            settings.async_checkpoint,
        )
        signals = signals_needed(self.terms, self.facts)
        self.loader = DistillLoader(
            self.caches,
            signals,
            self.geometry,
            settings.seed,
            settings.shuffle_shards,
            settings.workers,
            pin_memory=parallel.device.type == "cuda",
            pictures=pictures_of(run, settings, self.initial, self.image_caches, signals),
        )

    def _resume(self) -> TrainingState:
        latest = self.checkpoints.latest()
        if latest is None:
            return TrainingState(0, Position(), self.identity)
        tensors = tensors_of(self.distiller, self.optimizer, self.ema)
        state = self.checkpoints.load(latest, tensors)
        check_identity(state.identity, self.identity, str(latest))
        set_optimizer_step(self.optimizer, state.step)
        return state

    def _loop(self, state: TrainingState, log, on_progress, stop) -> float:
        settings, position, loss = self.settings, state.position, math.nan
        steps = self.loader.steps(position, settings.steps - state.step)
        for number in range(state.step, settings.steps):
            began = time.perf_counter()
            batches, after = next(steps)
            waited = time.perf_counter() - began
            progress, stopping = self._step(number, batches, stop)
            if stopping:
                self._save(number, position)
                self.checkpoints.finish()
                raise Interrupted(
                    f"stopped after step {number} of {settings.steps}",
                    remedy="Run the same command again to go on.",
                )
            position, loss = after, progress["loss"]
            seconds = time.perf_counter() - began
            if log is not None and (number + 1) % settings.log_every == 0:
                report = _report(number, settings, progress, waited, seconds)
                log.write(report.step, _flat(report))
                if on_progress is not None:
                    on_progress(report)
            if (number + 1) % settings.checkpoint_every == 0 or number + 1 == settings.steps:
                self._save(number + 1, position)
        return loss

    def _step(self, number: int, batches: list[DistillBatch], stop) -> tuple[dict, bool]:
        """One optimiser step, unless any rank wants to stop."""
        settings, parallel = self.settings, self.parallel
        done = number / max(settings.steps - 1, 1)
        weighed = [self.distiller.weigh(batch, done) for batch in batches]
        tokens = sum(batch.num_tokens for batch in batches)
        sums = torch.stack([totals for _, totals in weighed]).sum(dim=0)
        shared = parallel.sum(torch.cat([sums, torch.tensor([float(tokens), float(stop())])]))
        totals, tokens, stopping = shared[:-2], int(shared[-2]), bool(shared[-1])
        if stopping:
            return {}, True
        scale = self._scale(totals, done)
        torch.manual_seed(_step_seed(settings.seed, number, parallel.rank))
        found = [
            self._microbatch(batch, weights, scale, done, last=place == len(batches) - 1)
            for place, (batch, (weights, _)) in enumerate(zip(batches, weighed))
        ]
        values = self._finite(number, batches, torch.stack(found).cpu())
        norm = self._update(number, batches)
        weights = [term.weight(done) for term in self.terms]
        means = {
            term.label: value / weight if weight else 0.0
            for term, value, weight in zip(self.terms, values.tolist(), weights)
        }
        self.tokens += tokens
        loss = float(values.sum())
        return {"loss": loss, "values": means, "norm": norm, "tokens": tokens}, False

    def _scale(self, totals: torch.Tensor, done: float) -> list[float]:
        """Per objective: weight x ranks / global total (DDP and FSDP average over ranks)."""
        return [
            term.weight(done) * self.parallel.world_size / total if total > 0 else 0.0
            for term, total in zip(self.terms, totals.tolist())
        ]

    def _microbatch(
        self, batch: DistillBatch, weights, scale, done: float, last: bool
    ) -> torch.Tensor:
        device = self.parallel.device
        scaled = [(w * s).float() for w, s in zip(weights, scale)]
        with accumulating(self.module, last):
            with _autocast(device, self.settings.precision):
                values = self.module(batch.to(device), scaled, done)
            values.sum().backward()
        return values.detach()

    def _finite(self, number: int, batches, found: torch.Tensor) -> torch.Tensor:
        """The step's values over all ranks; stops, naming examples, when one is not finite."""
        values = self.parallel.sum(found.double().sum(dim=0)) / self.parallel.world_size
        if torch.isfinite(values).all():
            return values
        bad = [b.example_ids for b, row in zip(batches, found) if not torch.isfinite(row).all()]
        raise self._not_finite(f"loss of step {number + 1}", values.sum(), bad)

    def _not_finite(self, what: str, value: Any, examples: list[tuple[str, ...]]) -> StudentError:
        """The error that names the examples of all ranks."""
        shared = self.parallel.gather([name for ids in examples for name in ids])
        return StudentError(
            f"the {what} is not finite ({value:g})",
            where=f"examples {', '.join(name for part in shared for name in part)}",
            remedy="The last good checkpoint is kept; lower learning_rate or look at these texts.",
        )

    def _update(self, number: int, batches: list[DistillBatch]) -> float:
        """Clip, step, average; returns the gradient's norm before clipping."""
        settings = self.settings
        limit = settings.clip or math.inf
        norm = float(whole(nn.utils.clip_grad_norm_(self.parameters, limit)))
        if not math.isfinite(norm):
            every = [batch.example_ids for batch in batches]
            raise self._not_finite(f"gradient of step {number + 1}", norm, every)
        for group in self.optimizer.param_groups:
            group["lr"] = rate(settings, number)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for (_, parameter), average in zip(trainable(self.distiller), self.ema.values()):
            average.lerp_(parameter.detach(), 1 - settings.ema)
        return norm

    def _save(self, step: int, position: Position) -> None:
        state = TrainingState(step, position, self.identity)
        self.checkpoints.save(state, tensors_of(self.distiller, self.optimizer, self.ema))

    def _finished(self) -> TrainResult | None:
        path = self.settings_run.path(RESULT)
        if not path.exists() or not self.settings_run.path("student", "config.json").exists():
            return None
        facts = json.loads(path.read_text())
        check_identity(facts.pop("identity"), self.identity, str(path))
        return TrainResult(**facts | {"seconds": 0.0})

    def _finish(self, loss: float, seconds: float) -> TrainResult:
        """Export the student and say so; files are written by the main process."""
        student = self.settings_run.path("student")
        weights = self.ema or {name: p.detach() for name, p in trainable(self.distiller)}
        full = {name: whole(tensor) for name, tensor in weights.items()}
        result = TrainResult(
            str(student), str(self.initial), self.settings.steps, loss, self.tokens, seconds
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
                if name.startswith(prefix):
                    named[name.removeprefix(prefix)].copy_(tensor)
        return merge()


def _step_seed(seed: int, step: int, rank: int) -> int:
    digest = hashlib.sha256(f"{seed}:{step}:{rank}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _autocast(device: torch.device, precision: str) -> Any:
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _report(number: int, settings: Train, progress: dict, waited: float, seconds: float):
    return Progress(
        step=number + 1,
        steps=settings.steps,
        loss=progress["loss"],
        values=progress["values"],
        learning_rate=rate(settings, number),
        gradient_norm=progress["norm"],
        tokens_per_second=progress["tokens"] / seconds,
        data_wait_share=waited / seconds,
    )


def _flat(report: Progress) -> dict[str, float]:
    flat = {f"objective/{label}": value for label, value in report.values.items()}
    return flat | {
        "loss": report.loss,
        "learning_rate": report.learning_rate,
        "gradient_norm": report.gradient_norm,
        "tokens_per_second": report.tokens_per_second,
        "data_wait_share": report.data_wait_share,
    }
