"""One optimiser step over all ranks, and one measurement without a step.

One idea: totals are agreed on before the first forward pass, so each microbatch's contribution is
final when it is made, and DDP's or FSDP's mean over ranks is undone by the number of ranks.
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from stillroom.cache_schemas.errors import StudentError
from stillroom.pipeline.config.training import Train
from stillroom.pipeline.data.batch import DistillBatch
from stillroom.pipeline.objectives.combine import Distiller
from stillroom.pipeline.objectives.recommending import RankingDistiller
from stillroom.pipeline.objectives.reporting import reports_of
from stillroom.pipeline.objectives.weighting import Term, UnitWeights, scales
from stillroom.pipeline.training.checkpoint import trainable
from stillroom.pipeline.training.held_out import HeldOut
from stillroom.pipeline.training.optimization import rate
from stillroom.pipeline.training.parallel import Parallel, accumulating, let_go, whole


@dataclass(frozen=True, slots=True)
class Step:
    """What a step did.

    Attributes:
        loss: weighted sum of the objectives.
        values: objective label -> its mean, before its weight.
        reports: further numbers of the objectives, by `label/name`.
        warnings: what the objectives warn of.
        gradient_norm: before clipping.
        tokens: of all ranks, without padding.
    """

    loss: float
    values: dict[str, float]
    reports: dict[str, float]
    warnings: tuple[str, ...]
    gradient_norm: float
    tokens: int


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
        reports: further numbers of the objectives, by `label/name`.
        heldout: objective label -> mean on the held-out cache; empty when it was not measured.
        warnings: what the objectives warn of.
        measured_on: what `heldout` is of, in words.
    """

    step: int
    steps: int
    loss: float
    values: dict[str, float]
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    data_wait_share: float
    reports: dict[str, float] = field(default_factory=dict)
    heldout: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    measured_on: str = "held-out"

    @classmethod
    def of(
        cls,
        number: int,
        settings: Train,
        done: Step,
        waited: float,
        seconds: float,
        heldout: dict[str, float],
        measured_on: str,
    ) -> "Progress":
        """Describe step `number` (0-based), which took `seconds`, of which `waited` for data."""
        return cls(
            number + 1,
            settings.steps,
            done.loss,
            done.values,
            rate(settings, number),
            done.gradient_norm,
            done.tokens / seconds,
            waited / seconds,
            done.reports,
            heldout,
            done.warnings,
            measured_on,
        )

    def flat(self) -> dict[str, float]:
        """Names and numbers for the curves."""
        rows = self.measured_on.replace("-", "")
        return {
            "loss": self.loss,
            **{f"objective/{label}": value for label, value in self.values.items()},
            **{f"{rows}/{label}": value for label, value in self.heldout.items()},
            **{f"report/{label}": value for label, value in self.reports.items()},
            "learning_rate": self.learning_rate,
            "gradient_norm": self.gradient_norm,
            "tokens_per_second": self.tokens_per_second,
            "data_wait_share": self.data_wait_share,
        }


@dataclass
class Stepper:
    """Takes steps with one student on one rank.

    Attributes:
        settings: the [train] table.
        parallel: the ranks.
        distiller: student and objectives.
        module: the same, wrapped for the ranks.
        optimizer: over the trainable weights.
        averages: moving averages of the trainable weights, in their order; may be empty.
    """

    settings: Train
    parallel: Parallel
    distiller: Distiller | RankingDistiller
    module: nn.Module
    optimizer: torch.optim.Optimizer
    averages: list[torch.Tensor]

    def step(self, number: int, batches: list[DistillBatch], stop: bool) -> Step | None:
        """Step `number` (0-based) on this rank's microbatches; None if any rank wants to stop.

        Raises:
            StudentError: the loss or the gradient is not finite.
        """
        done = number / max(self.settings.steps - 1, 1)  # 0 at the first step, 1 at the last
        weighed = [self.distiller.weigh(batch, done) for batch in batches]
        totals, tokens, pictures, stopping = self._agree(batches, [own for _, own in weighed], stop)
        if stopping:
            return None
        distiller: Any = self.distiller  # a recommender's has no use for it
        awaited = self.parallel.awaits_what_sees(self.distiller, self.settings)
        distiller.reaches_all = pictures and awaited
        scale = scales(self._terms, totals, done, self.parallel.world_size)
        torch.manual_seed(_seed(self.settings.seed, number, self.parallel.rank))  # of dropout
        found = [
            self._microbatch(batch, weights, scale, done, last=place == len(batches) - 1)
            for place, (batch, (weights, _)) in enumerate(zip(batches, weighed))
        ]
        named = trainable(self.distiller)
        if self.settings.parallel == "fsdp":
            self.parallel.check_reached(named)
        parameters = [parameter for _, parameter in named]
        norm = self._clip(parameters)
        values, norm = self._judged(number, batches, torch.stack(found), norm)
        self._update(number, parameters)
        reports, warnings = reports_of(self.distiller, self.parallel.sum)
        means = self._means(values, done)
        loss = float(values[[bool(term.weight(done)) for term in self._terms]].sum())
        return Step(loss, means, reports, warnings, norm, tokens)

    def measure(self, heldout: HeldOut) -> dict[str, float]:
        """Means of the objectives over a held-out set, by the weights that would be exported."""
        distiller: Any = self.distiller  # a recommender's validation is its trainer's own
        found = []
        self.module.eval()
        with torch.no_grad(), distiller.judged_by(heldout.terms), self._averaged():
            for batch, counts in heldout.loader.once():
                weights, own = distiller.weigh(batch, 1.0)
                weights = UnitWeights([weight * counts for weight in weights])
                with _autocast(self.parallel.device, self.settings.precision):
                    values = self.module(batch.to(self.parallel.device), weights)
                found.append(torch.stack([values.double().cpu(), own * counts]))
            reports, _ = reports_of(self.distiller, self.parallel.sum)
            let_go(self.module)
        self.module.train()
        values, totals = self.parallel.sum(torch.stack(found).sum(dim=0))
        means = (values / totals.clamp_min(1e-30)).tolist()
        labels = [term.label for term in heldout.terms]
        measured = dict(zip(labels, means)) | reports
        return {heldout.prefix + name: value for name, value in measured.items()}

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Within it the student has its averaged weights, where such are kept."""
        parameters = [parameter for _, parameter in trainable(self.distiller)]
        own = [parameter.detach().clone() for parameter in parameters if self.averages]
        pairs = list(zip(parameters, self.averages))
        for parameter, average in pairs:
            parameter.copy_(average)
        try:
            yield
        finally:
            for parameter, kept in zip(parameters, own):
                parameter.copy_(kept)

    def _agree(self, batches, totals: list[torch.Tensor], stop: bool):
        """Totals of every objective, tokens, any image and the wish to stop, over all ranks."""
        tokens = sum(batch.num_tokens for batch in batches)
        # A recommender's histories have no images.
        pictures = sum(getattr(batch, "images", None) is not None for batch in batches)
        own = torch.stack(totals).sum(dim=0)  # float64 [objectives]
        # One collective for all four.
        told = torch.tensor([float(tokens), float(pictures), float(stop)])
        shared = self.parallel.sum(torch.cat([own, told]))
        return shared[:-3], int(shared[-3]), bool(shared[-2]), bool(shared[-1])

    @property
    def _terms(self) -> list[Term]:
        return self.distiller.terms

    def _means(self, values: torch.Tensor, done: float) -> dict[str, float]:
        weights = [term.weight(done) or 1.0 for term in self._terms]
        return {
            term.label: value / weight
            for term, value, weight in zip(self._terms, values.tolist(), weights)
        }

    def _microbatch(
        self, batch: DistillBatch, weights, scale: list[float], done: float, last: bool
    ) -> torch.Tensor:
        device = self.parallel.device
        scaled = UnitWeights(weights).times(scale)
        with accumulating(self.module, last):
            with _autocast(device, self.settings.precision):
                values = self.module(batch.to(device), scaled, done)  # [objectives]
            self.parallel.go_back(values.sum(), self.module)
        return values.detach()

    def _clip(self, parameters: list[nn.Parameter]) -> torch.Tensor:
        """Clip the gradients; their norm before, still on the device."""
        return whole(nn.utils.clip_grad_norm_(parameters, self.settings.clip or math.inf))

    def _judged(self, number: int, batches, found: torch.Tensor, norm: torch.Tensor):
        """The step's values over all ranks and the gradient's norm, finite both; the one time that
        a step waits for the device.

        Args:
            found: [microbatches, objectives] of this rank.

        Raises:
            StudentError: names examples.
        """
        # float64 holds either to the bit.
        told = torch.cat([found.double().flatten(), norm.double().reshape(1)]).cpu()
        found = told[:-1].view(found.shape)
        # Divided by the ranks, with which `scales` has multiplied for the gradients' sake.
        values = self.parallel.sum(found.sum(dim=0)) / self.parallel.world_size
        if not torch.isfinite(values).all():
            bad = [b.example_ids for b, row in zip(batches, found) if not torch.isfinite(row).all()]
            raise self._not_finite(f"loss of step {number + 1}", float(values.sum()), bad)
        if not torch.isfinite(told[-1]):
            every = [batch.example_ids for batch in batches]
            raise self._not_finite(f"gradient of step {number + 1}", float(told[-1]), every)
        return values, float(told[-1])

    def _not_finite(self, what: str, value: float, examples: list[tuple[str, ...]]) -> StudentError:
        """The error that names the examples of all ranks."""
        shared = self.parallel.gather([name for ids in examples for name in ids])
        return StudentError(
            f"the {what} is not finite ({value:g})",
            where=f"examples {', '.join(name for part in shared for name in part)}",
            remedy="The last good checkpoint is kept; lower learning_rate or look at these texts.",
        )

    def _update(self, number: int, parameters: list[nn.Parameter]) -> None:
        """Step with the clipped gradients, average."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate(self.settings, number)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for parameter, average in zip(parameters, self.averages):
            average.lerp_(parameter.detach(), 1 - self.settings.ema)


def _seed(seed: int, step: int, rank: int) -> int:
    """Of dropout: a function of the step, so that a resume needs no generator state."""
    digest = hashlib.sha256(f"{seed}:{step}:{rank}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _autocast(device: torch.device, precision: str) -> Any:
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
