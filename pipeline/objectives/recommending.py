"""The objectives of recommenders, and the module that trains one: student, terms and projectors.

One idea: as for language models, an objective is a line of the `[[objective]]` table and a function
that gives one value per row; rows, weights and the division by the global count are here, once.
A row that the teacher was not asked about adds nothing to what needs its answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn

from stillroom.cache_schemas.signals import ITEM_PREFIX
from stillroom.pipeline.config.strict import Table
from stillroom.pipeline.config.training import Objective
from stillroom.pipeline.data.histories import HistoryBatch
from stillroom.pipeline.objectives import combine, ranking
from stillroom.pipeline.objectives.registry import (
    HISTORY,
    CacheFacts,
    Needs,
    Spec,
    check_recommends,
    register,
)
from stillroom.pipeline.objectives.weighting import Term
from stillroom.pipeline.student.recommenders.model import SequentialRecommender

INTERACTIONS = "interactions"
"""What the main cache of a recommender holds: the corpus's own rows."""


@dataclass
class RankingContext:
    """All that one objective sees of one microbatch.

    Attributes:
        model: the student.
        batch: the microbatch.
        options, cache: this objective's options, and the name of its cache.
        counts: int64 [N], how often each item is a training target.
        vectors: cache name -> the teacher's item embeddings [N, width].
        projector: trained with the student and dropped at export.
    """

    model: SequentialRecommender
    batch: HistoryBatch
    counts: torch.Tensor
    vectors: Mapping[str, torch.Tensor]
    options: Any = None
    cache: str = ""
    projector: Any = None
    _robust: dict[tuple[float, float], ranking.Robust] = field(default_factory=dict)

    def of(self, options: Any, cache: str, projector: Any) -> "RankingContext":
        """The same microbatch for one objective."""
        self.options, self.cache, self.projector = options, cache, projector
        return self

    @cached_property
    def states(self) -> torch.Tensor:
        """[B, d]."""
        return self.model.states(self.batch.history)

    @cached_property
    def scores(self) -> torch.Tensor:
        """[B, N]."""
        return self.model.all_scores(self.states)

    @cached_property
    def negative(self) -> torch.Tensor:
        """[B]: score of one item that is neither in the history nor the one that came."""
        drawn = negatives(self.batch.history, self.batch.target, self.model.num_items)
        return self.model.scores(self.states, drawn[:, None])[:, 0]

    def robust(self, options: "DrosOptions") -> ranking.Robust:
        """DROS with these options, made once for all objectives that have the same."""
        key = (options.beta, options.power)
        if key not in self._robust:
            shares = ranking.propensity(self.counts, options.power).to(self.scores.dtype)
            self._robust[key] = ranking.Robust(self.scores, shares, options.beta)
        return self._robust[key]


def negatives(history: torch.Tensor, target: torch.Tensor, items: int) -> torch.Tensor:
    """int64 [B]: one item per row, drawn evenly from those that are not in the row.

    The n-th item that is left is found by going past those that are not, in order. A row that
    holds every item gets its last one.
    """
    taken = torch.cat([history, target[:, None]], dim=1).sort(dim=1).values
    again = torch.zeros_like(taken, dtype=torch.bool)
    again[:, 1:] = taken[:, 1:] == taken[:, :-1]
    taken = taken.masked_fill(again, items).sort(dim=1).values
    left = items - (taken < items).sum(dim=1)
    uniform = torch.rand(len(target), dtype=torch.float64, device=target.device)
    drawn = (uniform * left).long().clamp_max((left - 1).clamp_min(0))
    for place in range(taken.shape[1]):
        drawn = drawn + (taken[:, place] <= drawn)
    return drawn.clamp_max(items - 1)


class NextItemOptions(Table):
    """Options of `next_item`: binary cross-entropy with one drawn negative."""

    legacy_negatives: bool = False
    """-log sigmoid(1 - s) for the negative, as in DLLM2Rec's code."""


class DrosOptions(Table):
    """Options of `dros`; its weight in the table is the paper's alpha (1)."""

    beta: float = Field(default=1.0, gt=0)
    """Radius of the worst case over items."""
    power: float = Field(default=0.05, ge=0)
    """Of the share of training targets that an item has."""


class RankingOptions(DrosOptions):
    """Options of `ranking_distillation`; its weight in the table is the paper's lambda (0.8)."""

    k: int = Field(default=0, ge=0)
    """Candidates used, and no more than a list has; 0 uses the whole list. As many of the student's
    own best decide what is consistent. The paper's lists are of 10."""
    weights: Literal["importance", "uniform"] = "importance"
    """The paper's three weights, or the same for every candidate."""
    position: float = Field(default=0.3, ge=0)
    """Share of the weight that falls with the rank in the teacher's list; 0 switches it off."""
    confidence: float = Field(default=0.5, ge=0)
    """Share of the weight that falls with the distance of what the teacher wrote; likewise."""
    consistency: float = Field(default=0.1, ge=0)
    """Share of the weight of items that teacher and student both list; likewise."""
    normalise: Literal["list", "none"] = "list"
    """`list`: weights of one list sum to 1, as in the paper, so that confidence tells items of a
    list apart and never one list from another. `none`: a list far from everything weighs less."""
    position_temperature: float = Field(default=1.0, gt=0)
    """How slowly the weight falls with the rank."""
    confidence_temperature: float = Field(default=1.0, gt=0)
    """How slowly the weight falls with the distance."""
    dros: float = Field(default=1.0, ge=0)
    """Weight of DROS on every candidate beside its BCE: the paper's alpha."""
    legacy_negatives: bool = False
    """-log sigmoid(1 - s) for the negatives, as in DLLM2Rec's code."""

    @model_validator(mode="after")
    def _something_weighs(self) -> "RankingOptions":
        if self.weights == "importance" and not self.position + self.confidence + self.consistency:
            raise ValueError("all three weights are 0; for equal ones set weights = 'uniform'")
        return self


class HintOptions(Table):
    """Options of `item_hint`: plain embedding regression, the paper's baseline "Hint"."""

    layer: int | str = "final"
    """Of the item cache: the signal is `item.<layer>`."""

    @property
    def signal(self) -> str:
        """Name of the embedding."""
        return f"{ITEM_PREFIX}{self.layer}"


def _next_item(context: RankingContext) -> torch.Tensor:
    positive = context.model.scores(context.states, context.batch.target[:, None])[:, 0]
    return ranking.next_item(positive, context.negative, context.options.legacy_negatives)


def _dros(context: RankingContext) -> torch.Tensor:
    return context.robust(context.options).of(context.batch.target[:, None])[:, 0]


def candidate_weights(context: RankingContext) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, weights) [B, k] of a microbatch's candidates."""
    options: RankingOptions = context.options
    lists = context.batch.lists[context.cache]
    k = options.k or lists.ids.shape[1]
    ids, distances = lists.ids[:, :k], lists.distances[:, :k]
    if options.weights == "uniform":
        return ids, ranking.uniform_weights(ids)
    own = context.scores.detach().topk(min(k, context.scores.shape[1]), dim=1).indices
    far, scaled = distances.masked_fill(ids < 0, 0.0), options.normalise == "list"
    certain = ranking.confidence_weights(far, ids, options.confidence_temperature, scaled)
    parts = [
        (options.position, ranking.position_weights(ids, options.position_temperature)),
        (options.confidence, certain),
        (options.consistency, ranking.consistency_weights(ids, own)),
    ]
    return ids, ranking.importance([part for part in parts if part[0]], ids, scaled)


def _ranking(context: RankingContext) -> torch.Tensor:
    """sum over candidates of w_k [BCE(item_k, negative) + alpha DROS_k]."""
    options: RankingOptions = context.options
    ids, weights = candidate_weights(context)
    known = ids.clamp_min(0)
    positive = context.scores.gather(1, known)
    negative = context.negative[:, None].expand_as(positive)
    value = ranking.next_item(positive, negative, options.legacy_negatives)
    if options.dros:
        value = value + options.dros * context.robust(options).of(known)
    return (weights.to(value.dtype) * value).sum(dim=1)


def _hint(context: RankingContext) -> torch.Tensor:
    """Mean squared difference of the target's projected embedding and the teacher's."""
    own = context.projector(context.model.items(context.batch.target))
    wanted = context.vectors[context.cache][context.batch.target]
    return F.mse_loss(own, wanted, reduction="none").mean(dim=1)


def _answered(options: RankingOptions, batch: HistoryBatch, lists: Any) -> torch.Tensor:
    return lists.ids[:, 0] >= 0


def _hint_projector(options: HintOptions, width: int, facts: CacheFacts) -> nn.Module:
    return nn.Linear(width, facts.widths[options.signal])


_LISTS = Needs(("candidate_ids", "candidate_distances"))
_ROWS = Needs((INTERACTIONS,))
for _made in (
    Spec("next_item", HISTORY, NextItemOptions, _next_item, lambda _: _ROWS),
    Spec("dros", HISTORY, DrosOptions, _dros, lambda _: _ROWS),
    Spec(
        "ranking_distillation",
        HISTORY,
        RankingOptions,
        _ranking,
        lambda _: _LISTS,
        applies=_answered,
    ),
    Spec("item_hint", HISTORY, HintOptions, _hint, lambda o: Needs((o.signal,)), _hint_projector),
):
    register(_made)


def terms_of(objectives: Sequence[Objective], caches: Mapping[str, CacheFacts]) -> list[Term]:
    """Check a recommender's objectives; see `combine.terms_of`.

    Raises:
        ConfigError: also for an objective of language models.
    """
    terms = combine.terms_of(objectives, caches)
    for term in terms:
        check_recommends(term.spec, f"[[objective]] {term.label}")
    return terms


class RankingDistiller(nn.Module):
    """Student, projectors and objectives in one module; the counterpart of `combine.Distiller`.

    Args:
        model: the student.
        terms: its checked objectives.
        counts: int64 [N], how often each item is a training target.
        vectors: cache name -> the teacher's item embeddings [N, width].
    """

    def __init__(
        self,
        model: SequentialRecommender,
        terms: Sequence[Term],
        counts: torch.Tensor,
        vectors: Mapping[str, torch.Tensor],
    ):
        super().__init__()
        self.model, self.terms = model, list(terms)
        # Plain attributes: never trained, saved or sharded.
        self.counts, self.vectors = counts, dict(vectors)
        self.projectors = nn.ModuleDict()
        width = model.items.embedding_dim
        for number, term in enumerate(self.terms):
            made = term.spec.projector(term.options, width, term.facts)
            if made is not None:
                self.projectors[str(number)] = made
        self.sums: dict[str, dict[str, torch.Tensor]] = {}

    def weigh(self, batch: Any, progress: float) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Weights of every objective's rows, and their totals; see `combine.Distiller.weigh`.

        A total counts all rows, also those without the teacher's answer: a teacher that was asked
        about few rows is a small part of the mean, and not as much as if it had answered all.
        """
        weights = [self._rows(term, batch) for term in self.terms]
        return weights, torch.full((len(weights),), len(batch.target), dtype=torch.float64)

    def forward(
        self, batch: HistoryBatch, weights: list[torch.Tensor], progress: float = 1.0
    ) -> torch.Tensor:
        """Each objective's contribution to the step's loss, float32 [objectives]."""
        context = RankingContext(self.model, batch, self.counts, self.vectors)
        values = []
        for number, (term, weight) in enumerate(zip(self.terms, weights, strict=True)):
            key = str(number)
            projector = self.projectors[key] if key in self.projectors else None  # noqa: SIM401
            value = term.spec.compute(context.of(term.options, term.table.cache, projector))
            # An objective of weight 0 is shown and teaches nothing.
            value = value if term.weight(progress) else value.detach()
            # A row of weight 0 may have no list at all, and 0 times its value may not be a number.
            kept = torch.where(weight.to(value.device) > 0, value, 0.0)
            values.append((kept * weight.to(value.device)).sum())
        return torch.stack(values)

    def _rows(self, term: Term, batch: HistoryBatch) -> torch.Tensor:
        every = torch.ones(len(batch.target))
        if term.spec.applies is None:
            return every
        lists: Any = batch.lists[term.table.cache]
        return every * term.spec.applies(term.options, batch, lists)
