"""The sweep against a dense teacher: every word is an outcome.

One idea: the teacher's logits of the same rows are made beside the student's, chunk by chunk, from
its final hidden states and its head, so a cache of hidden states [N, D'] is a cache of whole
distributions at any temperature. With nothing left for a tail, the gradient is r_v - q_v R for
every word v: the closed forms of `divergences` with k = V and no column for a tail.
They make some ten tensors of their rows' size, so they see a few rows of the chunk at a time.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stillroom.pipeline.kernels import products
from stillroom.pipeline.kernels.divergences import (
    LOG_ZERO,
    Objective,
    Outcomes,
    head_share,
    outcome_gradient,
    terms,
)
from stillroom.pipeline.kernels.precision import widened
from stillroom.pipeline.kernels.targets import hard_weight
from stillroom.pipeline.kernels.vocabulary_shards import Shard

CPU_BLOCK = 2**19
CUDA_BLOCK = 2**26
"""Bytes of one tensor of the row arithmetic: cache-sized, or enough to fill a GPU."""


@dataclass(frozen=True, slots=True)
class DenseTargets:
    """A teacher known by its hidden states.

    Attributes:
        hidden: [N, D'] the teacher's final states.
        unembedding: [V', D'] its head; rows beyond the student's words are not read.
        bias: [V'] or None.
        softcap: soft cap of its logits, or None.
        labels, weights, cross_entropy: as in `targets.Targets`.
    """

    hidden: Tensor
    unembedding: Tensor
    bias: Tensor | None
    softcap: float | None
    labels: Tensor | None
    weights: Tensor | None
    cross_entropy: Tensor | None = None

    def __getitem__(self, rows: slice | Tensor) -> "DenseTargets":
        labels = None if self.labels is None else self.labels[rows]
        weights = None if self.weights is None else self.weights[rows]
        part = None if self.cross_entropy is None else self.cross_entropy[rows]
        hidden = self.hidden[rows]
        return replace(self, hidden=hidden, labels=labels, weights=weights, cross_entropy=part)


def sweep(
    buffer: Tensor, targets: DenseTargets, objective: Objective, shard: Shard, with_gradient: bool
) -> Tensor:
    """Losses [C] of a chunk; `buffer` [C, width + spare] turns from raw logits into gradients."""
    width = shard.width
    teacher = teacher_logits(targets, width).to(buffer.dtype)
    block = CUDA_BLOCK if buffer.is_cuda else CPU_BLOCK
    size = max(1, block // (buffer.element_size() * width))
    losses = [
        _sweep_block(logits, teacher[i : i + size], targets[i : i + size], objective, with_gradient)
        for i, logits in zip(range(0, len(buffer), size), buffer[:, :width].split(size))
    ]
    return torch.cat(losses)


def raw_teacher_logits(targets: DenseTargets, words: int) -> Tensor:
    """[C, words] logits of the teacher before any soft cap, in its head's dtype.

    Rows start at multiples of 16 elements, as those of the student's buffer do.
    """
    head = targets.unembedding[:words]
    hidden = targets.hidden.to(head.dtype)
    bias = None if targets.bias is None else targets.bias[:words].to(head.dtype)
    logits = head.new_empty(len(hidden), -(-words // 16) * 16)[:, :words]  # rows of whole 16s
    return products.logits(hidden, head, bias, out=logits)


def teacher_logits(targets: DenseTargets, words: int) -> Tensor:
    """[C, words] logits of the teacher, soft-capped."""
    logits = raw_teacher_logits(targets, words)
    return logits if targets.softcap is None else soft_capped(logits, targets.softcap)


def soft_capped(logits: Tensor, softcap: float) -> Tensor:
    """softcap tanh(logits / softcap), in at least fp32."""
    return softcap * torch.tanh(widened(logits) / softcap)


def head_shares(
    logits: Tensor, teacher: Tensor, targets: DenseTargets, objective: Objective, words: int
) -> Tensor:
    """AKL's w_h [C] in fp32, for raw logits of both sides [C, words + spare], [C, words]."""
    size = max(1, CUDA_BLOCK // (4 * words))
    shares = [
        _head_shares(widened(z), widened(y), targets.softcap, objective)
        for z, y in zip(logits[:, :words].split(size), teacher.split(size))
    ]
    return torch.cat(shares)


def _head_shares(z: Tensor, y: Tensor, cap: float | None, objective: Objective) -> Tensor:
    z = z if objective.softcap is None else soft_capped(z, objective.softcap)
    y = y if cap is None else soft_capped(y, cap)
    q = (z / objective.temperature).softmax(1)  # [rows, words]
    return head_share(dense_outcomes(y, objective.temperature), q)[:, 0]


def _sweep_block(
    logits: Tensor,
    teacher: Tensor,
    targets: DenseTargets,
    objective: Objective,
    with_gradient: bool,
) -> Tensor:
    slope = None
    if objective.softcap is not None:
        bent = torch.tanh(logits / objective.softcap)
        logits[:], slope = objective.softcap * bent, 1 - bent.square()
    outcomes = dense_outcomes(teacher, objective.temperature)
    q, log_q = _distribution(logits, objective.temperature)  # [rows, words]
    values, slopes = terms(objective, outcomes, log_q, q)
    loss = objective.temperature**2 * values.sum(1)
    hard, label = _hard(targets, objective, logits)
    plain = (q, log_q) if objective.temperature == 1 else _distribution(logits, 1.0)
    surprise = torch.where(hard > 0, -plain[1].gather(1, label), hard)[:, 0]
    if targets.cross_entropy is not None:
        targets.cross_entropy.copy_(surprise)
    loss += hard[:, 0] * surprise
    if with_gradient:
        gradient = outcome_gradient(slopes, q)
        torch.mul(gradient, objective.temperature, out=logits)
        if objective.ce_weight:
            logits.addcmul_(hard, plain[0])
            logits.scatter_add_(1, label, -hard)
        if slope is not None:
            logits *= slope
        if targets.weights is not None:
            logits *= targets.weights.to(logits)[:, None]
    return loss if targets.weights is None else loss * targets.weights.to(loss)


def dense_outcomes(logits: Tensor, temperature: float) -> Outcomes:
    """The teacher's distribution over every word; there is no tail."""
    p, log_p = _distribution(logits, temperature)
    return Outcomes(p, log_p, None)


def _distribution(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """softmax(logits / temperature) [C, words], and its logarithm, at least `LOG_ZERO`.

    The largest probability is 1 / sum exp(x - largest), which is all that the logarithm lacks:
    no second exponential of every word.
    """
    logits = logits if temperature == 1 else logits / temperature
    q = logits.softmax(1)
    log_q = logits - logits.amax(1, keepdim=True)
    return q, log_q.add_(q.amax(1, keepdim=True).log()).clamp_(min=LOG_ZERO)


def _hard(targets: DenseTargets, objective: Objective, like: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [C, 1] (see `hard_weight`) and column [C, 1] of each row's cross-entropy."""
    words = like.shape[1]
    weight = hard_weight(targets.labels, objective.ce_weight, like, words)
    if targets.labels is None:
        return weight, torch.zeros(len(like), 1, dtype=torch.int64, device=like.device)
    return weight, targets.labels[:, None].long().clamp(0, words - 1)
