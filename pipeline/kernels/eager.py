"""The divergence written the obvious way: all logits, log-softmax, autograd.

One idea: this is the truth the other implementations are judged by (in fp64), so its gradient comes
from autograd through the values, not from the closed forms. It holds about five [N, V] tensors and
saves no memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from stillroom.pipeline.kernels.dense_sweep import DenseTargets, dense_outcomes, teacher_logits
from stillroom.pipeline.kernels.divergences import LOG_ZERO, Objective, teacher_outcomes, terms
from stillroom.pipeline.kernels.packed_topk import PackedTargets
from stillroom.pipeline.kernels.precision import widened
from stillroom.pipeline.kernels.targets import Targets
from stillroom.pipeline.kernels.vocabulary_shards import FAR_BELOW


def topk_divergence(
    hidden: Tensor,
    unembedding: Tensor,
    bias: Tensor | None,
    targets: Targets | PackedTargets,
    objective: Objective,
    words: int,
) -> Tensor:
    """Per-row loss [N]; see `topk_divergence.topk_divergence` for the arguments."""
    targets = targets.unpack()
    logits = head_logits(hidden, unembedding, bias, words, objective.softcap)  # [N, V]
    teacher = teacher_outcomes(targets.ids, targets.logprobs, objective.tail, words, logits.dtype)
    log_q = student_outcomes(logits / objective.temperature, targets.ids)  # [N, k + 1]
    soft = terms(objective, teacher, log_q).value.sum(1)
    return total(soft, logits, targets, objective)


def linear_divergence(
    hidden: Tensor,
    unembedding: Tensor,
    bias: Tensor | None,
    targets: DenseTargets,
    objective: Objective,
    words: int,
) -> Tensor:
    """Per-row loss [N]; see `linear_divergence.linear_divergence` for the arguments."""
    logits = head_logits(hidden, unembedding, bias, words, objective.softcap)
    teacher = dense_outcomes(teacher_logits(targets, words).to(logits.dtype), objective.temperature)
    log_q = (logits / objective.temperature).log_softmax(1).clamp(min=LOG_ZERO)  # [N, V]
    soft = terms(objective, teacher, log_q).value.sum(1)
    return total(soft, logits, targets, objective)


def head_logits(
    hidden: Tensor, unembedding: Tensor, bias: Tensor | None, words: int, softcap: float | None
) -> Tensor:
    """Logits [N, words] in at least fp32, after the soft cap: cap * tanh(logits / cap)."""
    bias = None if bias is None else bias[:words]
    logits = widened(F.linear(hidden, unembedding[:words], bias))
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def total(
    soft: Tensor, logits: Tensor, targets: Targets | DenseTargets, objective: Objective
) -> Tensor:
    """temperature^2 * soft + ce_weight * cross-entropy, times the weights."""
    labels, weights = targets.labels, targets.weights
    loss = objective.temperature**2 * soft
    if objective.ce_weight and labels is not None:
        beyond = labels >= logits.shape[1]  # `debug` names it
        labels = labels.clamp(min=-1).masked_fill(beyond, -1).long()
        hard = F.cross_entropy(logits, labels, ignore_index=-1, reduction="none")
        hard = hard.masked_fill(beyond, torch.nan)
        loss = loss + objective.ce_weight * hard
        if targets.cross_entropy is not None:
            targets.cross_entropy.copy_(hard.detach())
    return loss if weights is None else loss * weights.to(loss)


def student_outcomes(logits: Tensor, ids: Tensor) -> Tensor:
    """log q [N, k + 1] of the ids and, last, of all words outside them, summed directly."""
    # Relative to the largest, as log-softmax does; it is a constant to the result.
    logits = logits - logits.detach().amax(1, keepdim=True).clamp(min=FAR_BELOW)
    lse = logits.logsumexp(1, keepdim=True)
    # One column more than there are words: where padding points.
    padded = F.pad(logits, (0, 1), value=FAR_BELOW)
    where = torch.where(ids < 0, logits.shape[1], ids).long()
    outside = padded.scatter(1, where, FAR_BELOW).logsumexp(1, keepdim=True)
    return (torch.cat([padded.gather(1, where), outside], 1) - lse).clamp(min=LOG_ZERO)
