"""Divergences from the teacher's whole distribution, rebuilt from its cached final states.

One idea: where the state that the teacher's head reads is cached anyway, logits need not be: the
head, kept once beside the student, gives them back in chunks, at any temperature. The error is that
of the state's codec alone.
"""

import torch
from pydantic import Field

from stillroom.cache_schemas.signals import hidden_name
from stillroom.pipeline.config.strict import Table
from stillroom.pipeline.data.batch import DistillBatch, Teacher
from stillroom.pipeline.kernels.divergences import DivergenceName
from stillroom.pipeline.kernels.linear_divergence import linear_divergence
from stillroom.pipeline.objectives.registry import Context, Needs, Spec, register

FINAL = hidden_name("final")


class FullVocabularyOptions(Table):
    """Options of `full_vocabulary`."""

    divergence: DivergenceName = "forward_kl"
    temperature: float = Field(default=1.0, gt=0)
    """Any: nothing about it has to be in the cache."""
    beta: float = Field(default=0.5, gt=0, lt=1)
    alpha: float = Field(default=0.1, ge=0, le=1)
    ce_weight: float = Field(default=0.0, ge=0)


def _full_vocabulary(context: Context) -> torch.Tensor:
    options: FullVocabularyOptions = context.options
    rows, head = context.batch.rows.flat, context.states.head
    place, found = _places(context.positions.flat, rows)
    states = context.teacher[FINAL][place] * found[:, None]  # [N, D_t]; rows without one weigh 0
    return linear_divergence(
        context.states.at(rows),
        head.weight,
        states,
        context.teacher_head,
        divergence=options.divergence,
        beta=options.beta,
        alpha=options.alpha,
        temperature=options.temperature,
        labels=context.batch.labels if options.ce_weight else None,
        ce_weight=options.ce_weight,
        weights=context.weights,
        bias=head.bias,
        softcap=head.softcap,
        valid_vocab=context.cache.vocab_size,
        impl=context.kernel,
    )


def _places(positions: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row, where its state is among the cached positions, and whether it is there.

    Args:
        positions: int64 [P], rising.
        rows: int64 [N].
    """
    place = torch.searchsorted(positions, rows).clamp_max(len(positions) - 1)
    return place, positions[place] == rows


def _applies(_options: FullVocabularyOptions, batch: DistillBatch, teacher: Teacher):
    """bool [N]: rows whose state is cached (a stride, or answers only, may leave some out)."""
    return _places(teacher.positions.flat, batch.rows.flat)[1]


register(
    Spec(
        "full_vocabulary",
        "row",
        FullVocabularyOptions,
        _full_vocabulary,
        lambda _: Needs((FINAL,), teacher_head=True),
        applies=_applies,
    )
)
