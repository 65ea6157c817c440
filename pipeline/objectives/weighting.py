"""What every row, position and example weighs in an objective.

One idea: a weight depends on the batch, the objective's table and how far the run is, not on the
student, so totals can be agreed on before the first forward pass. The one exception, a curriculum
by the gap to the student, keeps the total that was agreed on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from stillroom.pipeline.config.training import Objective
from stillroom.pipeline.data.batch import DistillBatch, Units
from stillroom.pipeline.objectives.divergence import hard_label
from stillroom.pipeline.objectives.registry import CacheFacts, Context, Needs, Spec

CURRICULUM_SIGNALS = {
    "none": (),
    "low_entropy_first": ("entropy",),
    "high_entropy_first": ("entropy",),
    "small_gap_first": ("token_logprob",),
    "large_gap_first": ("token_logprob",),
}
"""What ranks the rows: the teacher's entropy, or how much likelier than the student it finds the
token that follows (its log p minus the student's log q)."""

FIRST_SHARE = 0.25
"""Share of the rows that a curriculum admits at the first step."""


@dataclass(frozen=True, slots=True)
class Term:
    """One line of the `[[objective]]` table, checked."""

    label: str
    table: Objective
    spec: Spec
    options: Any
    needs: Needs
    facts: CacheFacts

    def weight(self, progress: float) -> float:
        """The objective's weight at a share of the run, 0 to 1."""
        last = self.table.final_weight
        return (
            self.table.weight
            if last is None
            else self.table.weight + progress * (last - self.table.weight)
        )


def scales(terms: Sequence[Term], totals: torch.Tensor, progress: float, ranks: int) -> list[float]:
    """Per objective: weight x ranks / global total (gradients are averaged over ranks).

    An objective of weight 0 is shown as it is (see `combine.Distiller.forward`).
    """
    return [
        (term.weight(progress) or 1.0) * ranks / total if total > 0 else 0.0
        for term, total in zip(terms, totals.tolist(), strict=True)
    ]


class UnitWeights:
    """The weights of a microbatch's units, out of the reach of what wraps the student.

    FSDP moves every tensor that it finds in a module's arguments to its device. Weights of rows
    are to stay on the CPU, where the sweep sees which rows it need not compute; so this is no list.

    Args:
        own: per objective float32 [units].
    """

    def __init__(self, own: Sequence[torch.Tensor]):
        self.own = tuple(own)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.own)

    def times(self, factors: Sequence[float]) -> "UnitWeights":
        """The same, each objective's multiplied by a factor."""
        return UnitWeights([(own * by).float() for own, by in zip(self.own, factors, strict=True)])


def unit_weights(term: Term, batch: DistillBatch, progress: float) -> torch.Tensor:
    """Weights of an objective's units before the division by the global total.

    A unit outside the mask weighs 0, one inside it its example's weight times its source's factor;
    `reduction = "sample"` divides that by the number of the example's units, so that examples and
    not rows are averaged.

    Returns:
        float32 [units].
    """
    factors = batch.sample_weight * _source_factors(term, batch)  # [E]
    if term.spec.unit == "image":
        return _image_weights(term, batch, factors)
    teacher = batch.teachers[term.table.cache]
    applies = term.spec.applies
    if term.spec.unit == "example":
        return factors if applies is None else factors * applies(term.options, batch, teacher)
    units = batch.rows if term.spec.unit == "row" else teacher.positions
    inside = _mask(term, batch, units)
    if applies is not None:
        inside = inside & applies(term.options, batch, teacher)
    inside = inside & _admitted(term, batch, progress, inside & (factors[units.example] != 0))
    weights = inside * factors[units.example]
    if term.table.reduction == "sample":
        counts = torch.zeros(len(factors)).index_add_(0, units.example, inside.float())  # [E]
        weights = weights / counts.clamp_min(1.0)[units.example]
    return weights


def _image_weights(term: Term, batch: DistillBatch, factors: torch.Tensor) -> torch.Tensor:
    """An image weighs its example's weight where it has a target, and nothing elsewhere."""
    if batch.images is None:
        return factors[:0]
    return factors[batch.images.example] * batch.images.targets[term.table.cache].present


def _source_factors(term: Term, batch: DistillBatch) -> torch.Tensor:
    factors = term.table.source_weights
    return torch.tensor([factors.get(source, 1.0) for source in batch.sources])


def _mask(term: Term, batch: DistillBatch, units: Units) -> torch.Tensor:
    if term.table.mask == "answer":
        unshifted = getattr(term.options, "legacy_unshifted", False)
        return batch.own_answer if unshifted else units.answer
    if term.table.mask == "image":
        return units.image
    return ~units.image if term.table.mask == "text" else torch.ones_like(units.image)


def _admitted(
    term: Term, batch: DistillBatch, progress: float, counted: torch.Tensor
) -> torch.Tensor:
    """bool [units]: rows that a curriculum by teacher entropy admits now.

    Args:
        counted: bool [units], rows that weigh anything; others are not ranked.
    """
    if not term.table.curriculum.endswith("entropy_first") or term.spec.unit != "row":
        return torch.ones_like(counted)
    entropy = batch.teachers[term.table.cache].signals["entropy"]
    return admitted_among(counted, entropy, progress, term.table.curriculum.startswith("low"))


def admitted_among(
    counted: torch.Tensor, score: torch.Tensor, progress: float, low_first: bool
) -> torch.Tensor:
    """bool [N]: what `admitted` admits of the rows in `counted`, bool [N]; others have no rank."""
    stay = torch.zeros_like(counted)
    stay[counted] = admitted(score[counted], progress, low_first)
    return stay


def admitted(score: torch.Tensor, progress: float, low_first: bool) -> torch.Tensor:
    """Rows of lowest (highest) score: `FIRST_SHARE` of them at first, all of them at the end.

    Args:
        score: [N].
        progress: 0 to 1.
        low_first: which end comes first.

    Returns:
        bool [N].
    """
    # The order's order: each row's rank.
    ranks = (score if low_first else -score).argsort(stable=True).argsort().double()
    share = FIRST_SHARE + (1 - FIRST_SHARE) * progress
    return ranks < max(1.0, share * len(score))


def admit_by_gap(context: Context, curriculum: str, progress: float) -> Context:
    """Leave out rows by the gap between teacher and student; those that stay weigh more.

    The total weight of the microbatch stays, because it is divided out before the student is run.
    """
    weights, labels = context.weights, context.batch.labels
    inside = weights != 0
    with torch.no_grad():
        log_q = -hard_label(context, labels, weights=inside.float())
    gap = (context.teacher["token_logprob"] - log_q).cpu()  # [N], nats
    kept = weights * admitted_among(inside, gap, progress, curriculum.startswith("small"))
    total = kept.sum()
    return replace(context, weights=kept * (weights.sum() / total if total > 0 else 0.0))
