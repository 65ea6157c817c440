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

from stillroom.pipeline.kernels.divergences import (
    Objective,
    outcome_gradient,
    teacher_outcomes,
    terms,
)
from stillroom.pipeline.kernels.packed_topk import PackedTargets
from stillroom.pipeline.kernels.targets import Targets, hard_weight
from stillroom.pipeline.kernels.vocabulary_shards import FAR_BELOW, Shard, ShardStatistics, combine


def sweep(
    buffer: Tensor,
    targets: Targets | PackedTargets,
    objective: Objective,
    shard: Shard,
    with_gradient: bool,
) -> Tensor:
    """Losses [C] of a chunk; `buffer` [C, width + spare] turns from raw logits into gradients.

    Args:
        buffer: fp32 or fp64; columns from `shard.width` on are spare and left undefined.
        targets: teacher, labels and weights of these rows.
        objective: the loss of a row.
        shard: which words the columns are.
        with_gradient: False leaves the buffer undefined and saves two passes.
    """
    targets = targets.unpack()
    columns = shard.columns(targets.ids)  # [C, k]
    label = label_column(targets, objective, shard)
    cap_slope = _cap_(buffer, objective.softcap, with_gradient)
    local, plain = _statistics_(buffer, columns, label, objective, shard.width)
    verdict = judge(targets, objective, shard, local)
    if with_gradient:
        _gradient_(buffer, columns, label, plain, local, verdict)
        if cap_slope is not None:
            buffer.mul_(cap_slope)
    return verdict.loss


@dataclass(frozen=True, slots=True)
class Verdict:
    """Losses of a chunk's rows, and what their gradients are made of, row weights included.

    Attributes:
        loss: [C].
        inside: [C, k] d loss / d z of the list's words; cross-entropy included where z is x.
        outside: [C, 1] factor of this shard's own distribution of the words outside.
        plain: [C, 1] factor of this shard's own softmax(z), where z is not x.
        hard: [C, 1] what the label's gradient is less.
    """

    loss: Tensor
    inside: Tensor
    outside: Tensor
    plain: Tensor
    hard: Tensor


def judge(targets: Targets, objective: Objective, shard: Shard, local: ShardStatistics) -> Verdict:
    """The closed forms of [C, k + 1] outcomes, once the shards have put their statistics together.

    Args:
        targets: teacher, labels and weights of these rows.
        objective: the loss of a row.
        shard: which words the statistics are of.
        local: this shard's statistics.
    """
    student = combine(shard, targets.ids, local)
    dtype = local.support.dtype
    teacher = teacher_outcomes(targets.ids, targets.logprobs, objective.tail, shard.total, dtype)
    values, slopes = terms(objective, teacher, student.log_q)
    hard = hard_weight(targets.labels, objective.ce_weight, student.log_q, shard.total)
    # 0 * -inf: a row without a label may have any number here.
    surprise = torch.where(hard > 0, -student.label_logprob, hard)
    if targets.cross_entropy is not None:
        targets.cross_entropy.copy_(surprise[:, 0])
    loss = objective.temperature**2 * values.sum(1) + (hard * surprise)[:, 0]
    q = student.log_q.exp()
    outcomes = outcome_gradient(slopes, q) * objective.temperature  # [C, k + 1]
    if local.plain_peak is None:
        outcomes += q * hard
    if targets.weights is not None:
        row_weights = targets.weights.to(loss)
        loss = loss * row_weights
        outcomes, hard = outcomes * row_weights[:, None], hard * row_weights[:, None]
    outside = outcomes[:, -1:] * student.tail_share  # [C, 1]
    return Verdict(loss, outcomes[:, :-1], outside, hard * student.plain_share, hard)


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
    buffer: Tensor, columns: Tensor, label: Tensor | None, objective: Objective, width: int
) -> tuple[ShardStatistics, Tensor | None]:
    """This shard's statistics; leaves the tail's distribution in the buffer.

    The second value is softmax(z) at temperature 1, where cross-entropy needs another than x's.
    """
    buffer[:, width:] = FAR_BELOW
    plain, plain_peak, plain_total = None, None, None
    at_label = buffer.new_full((len(buffer), 1), FAR_BELOW)
    if label is not None:
        at_label = buffer.gather(1, label)
        if objective.temperature != 1:
            plain = buffer.clone()
            plain_peak, plain_total = _softmax_(plain, width)
    if objective.temperature != 1:
        buffer[:, :width] /= objective.temperature
    support = buffer.gather(1, columns)  # [C, k]
    buffer.scatter_(1, columns, -torch.inf)  # what is left is the tail
    buffer[:, width:] = FAR_BELOW
    peak, total = _softmax_(buffer, width)
    return ShardStatistics(support, peak, total, at_label, plain_peak, plain_total), plain


def _softmax_(buffer: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Softmax over each row in place; its largest logit and total = sum exp(x - largest), [C, 1].

    A spare column is given the largest logit too, so that its probability, 1 / (1 + total), tells
    the total and no pass over the row need ask for it. The row is 1 + 1 / total too small by that.
    """
    peak = buffer.amax(1, keepdim=True)
    spare = buffer[:, width : width + 1]
    spare.copy_(peak)
    torch.softmax(buffer, 1, out=buffer)
    return peak, 1 / spare - 1  # from p = 1 / (1 + total)


def _gradient_(
    buffer: Tensor,
    columns: Tensor,
    label: Tensor | None,
    plain: Tensor | None,
    local: ShardStatistics,
    verdict: Verdict,
) -> None:
    """Overwrites the tail's distribution, as `_softmax_` leaves it, with d loss / d z."""
    buffer.mul_(verdict.outside * (1 + 1 / local.tail_total))
    buffer.scatter_(1, columns, verdict.inside)
    if plain is not None and local.plain_total is not None:
        buffer.addcmul_(plain, verdict.plain * (1 + 1 / local.plain_total))
    if label is not None:
        buffer.scatter_add_(1, label, -verdict.hard)
