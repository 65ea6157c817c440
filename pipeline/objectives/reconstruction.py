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
from stillroom.pipeline.objectives.padding import push_off
from stillroom.pipeline.objectives.parts import keep_parts, labelled, parts
from stillroom.pipeline.objectives.registry import Context, Needs, Spec, register
from stillroom.pipeline.teacher.reference.head import Head

FINAL = hidden_name("final")


class FullVocabularyOptions(Table):
    """Options of `full_vocabulary`."""

    divergence: DivergenceName = "forward_kl"
    """Which one, of teacher and student over the whole vocabulary."""
    temperature: float = Field(default=1.0, gt=0)
    """Any: nothing about it has to be in the cache."""
    beta: float = Field(default=0.5, gt=0, lt=1)
    """`jsd`: the teacher's share of the mixture."""
    alpha: float = Field(default=0.1, gt=0, lt=1)
    """The skewed divergences: the share mixed in of the other distribution."""
    ce_weight: float = Field(default=0.0, ge=0)
    """Weight of cross-entropy on the text's own tokens, from the same sweep of the head."""


def _full_vocabulary(context: Context) -> torch.Tensor:
    options: FullVocabularyOptions = context.options
    rows, head = context.batch.rows.flat, context.states.head
    teacher: Head = context.teacher_head
    place, found = _places(context.positions.flat, rows)
    states = context.teacher[FINAL][place] * found[:, None]
    given = labelled(context, options.ce_weight)
    value = linear_divergence(
        context.states.at(rows),
        head.weight,
        states if teacher.scale == 1.0 else states * teacher.scale,
        teacher.weight,
        divergence=options.divergence,
        beta=options.beta,
        alpha=options.alpha,
        temperature=options.temperature,
        weights=context.weights,
        bias=head.bias,
        softcap=head.softcap,
        teacher_bias=teacher.bias,
        teacher_softcap=teacher.softcap,
        valid_vocab=context.cache.vocab_size,
        impl=context.kernel,
        **given,
    )
    value = push_off(context, value, options.ce_weight, given.get("cross_entropy"))
    return keep_parts(context, value, given)


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
        report=parts,
    )
)
