"""The loss of a batch from a cache, for a training loop of one's own.

One idea: it is the loss of `stillroom train`: the same objectives with the same masks and weights,
given final states and a head instead of a student. Objectives that look into the student's blocks
or bring weights of their own need the trainers of `stillroom.hf`.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from stillroom.cache_schemas.errors import StudentError
from stillroom.pipeline.config.strict import validate
from stillroom.pipeline.config.training import Train
from stillroom.pipeline.data.batch import NO_TEACHER
from stillroom.pipeline.doors.cached import CachedBatch
from stillroom.pipeline.doors.fit import bare
from stillroom.pipeline.objectives.combine import value_of, within
from stillroom.pipeline.objectives.registry import Context
from stillroom.pipeline.objectives.requirements import check_scores
from stillroom.pipeline.objectives.weighting import Term, unit_weights
from stillroom.pipeline.student.states import StudentStates, read_by_head
from stillroom.pipeline.teacher.reference.head import Head, head_of
from stillroom.pipeline.training.run import resolved


def loss_totals(batches: Iterable[CachedBatch], progress: float = 1.0) -> torch.Tensor:
    """What each objective is divided by: float64 [objectives], summed over microbatches.

    With gradient accumulation, give all microbatches of a step; with several ranks, add the results
    up over them (and multiply the loss by their number, if gradients are averaged).
    """
    return torch.stack(
        [
            torch.stack([unit_weights(term, b.host, progress).double().sum() for term in b.terms])
            for b in batches
        ]
    ).sum(dim=0)


def distillation_loss(
    hidden: torch.Tensor,
    head: Any,
    batch: CachedBatch,
    totals: Sequence[float] | torch.Tensor | None = None,
    progress: float = 1.0,
    kernel: str = "auto",
) -> torch.Tensor:
    """The weighted sum of the batch's objectives; no logits are made.

    Args:
        hidden: [B, S, D], the decoder's last hidden state for `batch.inputs`.
        head: the student, whose head is measured (soft caps and factors included); or the matrix
            that logits are made with, as `nn.Linear` or [V, D], where nothing is done beside it.
        batch: from `CachedDataset`, on the device of `hidden`.
        totals: of the whole step (see `loss_totals`); None takes this batch's own.
        progress: share of the run that is done, for weights and curricula that change.
        kernel: as `[train] kernel`.

    Returns:
        A scalar, float32 or what `hidden` is where that is wider.

    Raises:
        StudentError: states of other tokens than the batch's, or an objective that needs more than
            final states and a head.
    """
    _check_shape(hidden, batch)
    states = _states(hidden, head)
    terms = [within(term, states.head.weight.shape[0]) for term in batch.terms]
    for term in terms:
        _check_term(term)
    check_scores(terms, states.head)
    totals = loss_totals([batch], progress) if totals is None else totals
    chosen = resolved(validate(Train, {"kernel": kernel}, "kernel"), hidden.device).kernel
    return torch.stack(
        [
            _value(term, states, batch, float(total), progress, chosen)
            for term, total in zip(terms, totals, strict=True)
        ]
    ).sum()


def _states(hidden: torch.Tensor, head: Any) -> StudentStates:
    if hasattr(head, "get_output_embeddings"):
        student = bare(head)
        _check_width(hidden, student.get_output_embeddings().weight)
        return StudentStates(read_by_head(student, hidden).flatten(0, 1), head_of(student))
    linear = isinstance(head, nn.Linear)
    made = Head(head.weight, head.bias) if linear else Head(head)
    _check_width(hidden, made.weight)
    return StudentStates(hidden.flatten(0, 1), made)


def _value(
    term: Term, states: StudentStates, batch: CachedBatch, total: float, progress: float, kernel
) -> torch.Tensor:
    factor = term.weight(progress) / total if total > 0 else 0.0
    weights = (unit_weights(term, batch.host, progress) * factor).float()
    teacher = batch.batch.teachers.get(term.table.cache, NO_TEACHER)
    context = Context(
        states,
        batch.batch,
        teacher.signals,
        teacher.positions,
        weights if term.spec.unit == "row" else weights.to(states.final.device),
        term.options,
        term.facts,
        None,
        kernel,
        cache_name=term.table.cache,
    )
    return value_of(term, context, progress)[0]


def _check_shape(hidden: torch.Tensor, batch: CachedBatch) -> None:
    wanted = tuple(batch.batch.input_ids.shape)
    if hidden.dim() != 3 or tuple(hidden.shape[:2]) != wanted:
        raise StudentError(
            f"hidden states of shape {tuple(hidden.shape)}",
            expected=f"[{wanted[0]}, {wanted[1]}, width], one for every token of batch.inputs",
            where="distillation_loss",
            remedy="Give the decoder's last_hidden_state as it is, neither shifted nor cut.",
        )


def _check_width(hidden: torch.Tensor, weight: torch.Tensor) -> None:
    rows, width = weight.shape
    if hidden.shape[2] == width:
        return
    logits = ": these look like logits" if hidden.shape[2] == rows else ""
    raise StudentError(
        f"hidden states of {hidden.shape[2]} numbers{logits}",
        expected=f"{width}, the width of the head's matrix [{rows}, {width}]",
        where="distillation_loss",
        remedy="Give the decoder's last_hidden_state (student.model(**batch.inputs)), and not what "
        "a head has made of it.",
    )


def _check_term(term: Term) -> None:
    needs = term.needs
    if term.spec.unit != "row" or needs.blocks or needs.teacher_head or needs.routers:
        raise StudentError(
            f"objective {term.label} needs more of the student than final states and a head",
            where="distillation_loss",
            remedy="Use the trainers of stillroom.hf or `stillroom train`, which hold the student.",
        )
