"""The divergence written the obvious way: all logits, log-softmax, autograd.

One idea: this is the truth the other implementations are judged by (in fp64), so its gradient comes
from autograd through the values, not from the closed forms. It holds about five [N, V] tensors and
saves no memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.kernels.divergences import LOG_ZERO, Objective, Outcomes, teacher_outcomes, values
from pipeline.kernels.vocabulary_shards import FAR_BELOW


def topk_divergence(
    hidden: Tensor,
    unembedding: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    logprobs: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    objective: Objective,
) -> Tensor:
    """Per-row loss [N]; see `topk_divergence.topk_divergence` for the arguments."""
    logits = capped(F.linear(hidden, unembedding, bias), objective.softcap)
    scaled = logits / objective.temperature
    teacher = teacher_outcomes(ids, logprobs, objective.tail, logits.shape[1], logits.dtype)
    log_q = student_outcomes(scaled, ids)
    loss = objective.temperature**2 * values(objective, teacher, log_q).sum(1)
    if objective.ce_weight and labels is not None:
        loss = loss + objective.ce_weight * cross_entropy(logits, labels)
    return loss if weights is None else loss * weights.to(loss)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits in at least fp32, after Gemma's soft cap: cap * tanh(logits / cap)."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


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


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy [N] at temperature 1; 0 where the label is negative."""
    return F.cross_entropy(logits, labels.clamp(min=-1).long(), ignore_index=-1, reduction="none")


def linear_divergence(
    hidden: Tensor,
    unembedding: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_unembedding: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    objective: Objective,
    teacher_softcap: float | None,
) -> Tensor:
    """Per-row loss [N] against the teacher's whole distribution; see `linear_divergence`."""
    logits = capped(F.linear(hidden, unembedding, bias), objective.softcap)
    teacher_logits = capped(F.linear(teacher_hidden, teacher_unembedding), teacher_softcap)
    teacher = dense_outcomes((teacher_logits / objective.temperature).to(logits.dtype))
    log_q = (logits / objective.temperature).log_softmax(1).clamp(min=LOG_ZERO)
    log_q = F.pad(log_q, (0, 1), value=LOG_ZERO)
    loss = objective.temperature**2 * values(objective, teacher, log_q).sum(1)
    if objective.ce_weight and labels is not None:
        loss = loss + objective.ce_weight * cross_entropy(logits, labels)
    return loss if weights is None else loss * weights.to(loss)


def dense_outcomes(logits: Tensor) -> Outcomes:
    """Every word an outcome, and an empty tail."""
    log_p = F.pad(logits.log_softmax(1).clamp(min=LOG_ZERO), (0, 1), value=LOG_ZERO)
    return Outcomes(log_p.exp(), log_p, F.pad(torch.ones_like(logits, dtype=torch.bool), (0, 1)))
