"""The sweep in torch: a chunk's logits become its losses and, in place, their gradient.

One idea: put the logits of the k ids aside and minus infinity in their places; an in-place softmax
of what is left is then the tail's own distribution s_i = exp(x_i - lse_tail), summed directly
(1 - sum of the k would lose it to rounding), and the gradient outside the ids is one scalar per
row times s. Every pass over the buffer is one torch call that allocates nothing of its size, but
for a second buffer where the loss needs one (soft cap; cross-entropy at another temperature).
The formulas are derived in `topk_divergence`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.kernels.divergences import (
    LOG_ZERO,
    Objective,
    Outcomes,
    slopes,
    teacher_outcomes,
    values,
)
from pipeline.kernels.eager import FAR_BELOW
from pipeline.kernels.targets import Targets
from pipeline.kernels.vocabulary_shards import Shard


@dataclass(slots=True)
class Student:
    """Row statistics of the student over all words, at the objective's temperature.

    Attributes:
        log_q: [C, k + 1] log-probabilities of the outcomes, the tail last.
        tail_share: [C, 1] share of the tail's mass that lies in this shard.
        label_logprob: [C, 1] at temperature 1; meaningless without a label.
        plain_share: [C, 1] share of all mass at temperature 1 that lies in this shard.
    """

    log_q: Tensor
    tail_share: Tensor
    label_logprob: Tensor
    plain_share: Tensor


def sweep(
    buffer: Tensor, targets: Targets, objective: Objective, shard: Shard, with_gradient: bool
) -> Tensor:
    """Losses [C] of a chunk; `buffer` [C, width + spare] turns from raw logits into gradients.

    Args:
        buffer: fp32 or fp64; columns from `shard.width` on are spare and left undefined.
        targets: teacher, labels and weights of these rows.
        objective: the loss of a row.
        shard: which words the columns are.
        with_gradient: False leaves the buffer undefined and saves two passes.
    """
    columns = shard.columns(targets.ids)
    label = label_column(targets, objective, shard)
    cap_slope = _cap_(buffer, objective.softcap, with_gradient)
    student, plain = _statistics_(buffer, columns, label, targets, objective, shard)
    teacher = teacher_outcomes(
        targets.ids, targets.logprobs, objective.tail, shard.total, buffer.dtype
    )
    if with_gradient:
        _gradient_(buffer, columns, label, plain, targets, objective, teacher, student)
        if cap_slope is not None:
            buffer.mul_(cap_slope)
    return _loss(objective, targets, teacher, student)


def label_column(targets: Targets, objective: Objective, shard: Shard) -> Tensor | None:
    """[C, 1] column of the label, or None where the loss has no cross-entropy."""
    if targets.labels is None or not objective.ce_weight:
        return None
    return shard.columns(targets.labels)[:, None]


def _cap_(buffer: Tensor, softcap: float | None, with_gradient: bool) -> Tensor | None:
    """Soft-caps the logits in place; returns the cap's slope 1 - tanh^2."""
    if softcap is None:
        return None
    buffer.div_(softcap).tanh_()
    slope = 1 - buffer.square() if with_gradient else None
    buffer.mul_(softcap)
    return slope


def _statistics_(
    buffer: Tensor,
    columns: Tensor,
    label: Tensor | None,
    targets: Targets,
    objective: Objective,
    shard: Shard,
) -> tuple[Student, Tensor | None]:
    """The student's statistics; leaves the tail's distribution in the buffer.

    The second value is softmax(z) at temperature 1, where cross-entropy needs another than x's.
    """
    label_logit = (
        buffer.new_zeros(len(buffer), 1) if label is None else _owned(buffer, label, shard)
    )
    buffer[:, shard.width :] = FAR_BELOW
    plain, plain_lse = None, buffer.new_zeros(len(buffer), 1)
    if label is not None and objective.temperature != 1:
        plain = buffer.clone()
        plain_lse = _softmax_(plain)
    if objective.temperature != 1:
        buffer.div_(objective.temperature)
    support = _owned(buffer, columns, shard)
    buffer.scatter_(1, columns, -torch.inf)
    buffer[:, shard.width :] = FAR_BELOW
    tail_lse = _softmax_(buffer)
    lse, sums = shard.combine(
        torch.cat([tail_lse, plain_lse], 1), torch.cat([support, label_logit], 1)
    )
    support = sums[:, :-1].masked_fill(targets.ids < 0, FAR_BELOW)
    logits = torch.cat([support, lse[:, :1]], 1)
    log_q = logits - logits.logsumexp(1, keepdim=True)
    at_one = lse[:, 1:] if plain is not None else logits.logsumexp(1, keepdim=True)
    student = Student(
        log_q=log_q.clamp(min=LOG_ZERO),
        tail_share=(tail_lse - lse[:, :1]).exp(),
        label_logprob=sums[:, -1:] - at_one,
        plain_share=(plain_lse - lse[:, 1:]).exp(),
    )
    return student, plain


def _owned(buffer: Tensor, columns: Tensor, shard: Shard) -> Tensor:
    """Logits at the columns; 0 where another shard holds them."""
    return buffer.gather(1, columns).masked_fill_(columns == shard.width, 0)


def _softmax_(buffer: Tensor) -> Tensor:
    """Softmax over each row, in place; returns its log-sum-exp [C, 1].

    The largest probability is 1 / sum exp(x - max), so the sum need not be asked for.
    """
    peak = buffer.amax(1, keepdim=True)
    torch.softmax(buffer, 1, out=buffer)
    return peak - buffer.amax(1, keepdim=True).log()


def _gradient_(
    buffer: Tensor,
    columns: Tensor,
    label: Tensor | None,
    plain: Tensor | None,
    targets: Targets,
    objective: Objective,
    teacher: Outcomes,
    student: Student,
) -> None:
    """Overwrites the tail's distribution with d loss / d z of every column."""
    r, q = slopes(objective, teacher, student.log_q), student.log_q.exp()
    outcomes = (r - q * r.sum(1, keepdim=True)) * objective.temperature
    hard = _hard_weight(objective, targets, buffer)
    if plain is None:
        outcomes += q * hard
    if targets.weights is not None:
        row_weights = targets.weights.to(buffer)[:, None]
        outcomes, hard = outcomes * row_weights, hard * row_weights
    buffer.mul_(outcomes[:, -1:] * student.tail_share)
    buffer.scatter_(1, columns, outcomes[:, :-1])
    if plain is not None:
        buffer.addcmul_(plain, hard * student.plain_share)
    if label is not None:
        buffer.scatter_add_(1, label, -hard)


def _hard_weight(objective: Objective, targets: Targets, like: Tensor) -> Tensor:
    """Weight of each row's cross-entropy [C, 1]: 0 without a label."""
    if targets.labels is None:
        return like.new_zeros(1, 1)
    return (targets.labels >= 0)[:, None].to(like) * objective.ce_weight


def _loss(objective: Objective, targets: Targets, teacher: Outcomes, student: Student) -> Tensor:
    hard = _hard_weight(objective, targets, student.log_q)
    loss = objective.temperature**2 * values(objective, teacher, student.log_q).sum(1)
    # 0 * -inf: a row without a label may have any number here.
    loss = loss - torch.where(hard > 0, hard * student.label_logprob, 0)[:, 0]
    return loss if targets.weights is None else loss * targets.weights.to(loss)
