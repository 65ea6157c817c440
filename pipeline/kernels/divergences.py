"""The row closed forms: each divergence's value and its slope, outcome by outcome.

One idea: a row compares two distributions over *outcomes*, the teacher's k ids plus (usually) one
tail outcome that stands for every other word, so every tensor here is [rows, k + 1] with the tail
in the last column. A divergence is a sum of f(p_m, q_m) over outcomes; what its gradient needs is
r_m = q_m df/dq_m. How r becomes the gradient of logits is derived in `topk_divergence`; nothing
here knows about vocabularies, logits or devices.

    divergence       f(p, q)                                         r = q df/dq
    forward_kl       p (log p - log q)                               -p
    reverse_kl       q (log q - log p)                               q (log q - log p + 1)
    jsd              b p (log p - log m) + (1-b) q (log q - log m)   (1-b) q (log q - log m)
                     m = b p + (1-b) q
    skew_forward_kl  p (log p - log m),  m = a p + (1-a) q           -(1-a) p q / m
    skew_reverse_kl  q (log q - log m),  m = (1-a) p + a q           q (log q - log m + 1 - a q / m)
    tv               |p - q| / 2                                     q sign(q - p) / 2
    adaptive_kl      w_h forward_kl + w_t reverse_kl                 the same mix of their r

For `jsd`, d/dq of the first term is -b (1-b) p / m and of the second
(1-b)(log q - log m + 1 - (1-b) q / m); the 1 and the two fractions cancel, as m = b p + (1-b) q.
Mixtures are taken in log space (`logaddexp`): in probability space 0 * log 0 gives NaN.

Sources: jsd is GKD's generalised Jensen-Shannon divergence (Agarwal et al. 2024, arXiv:2306.13649);
the skew divergences are DistiLLM's (Ko et al. 2024, arXiv:2402.03898); adaptive_kl is AKL (Wu et
al. 2024, arXiv:2404.02657): per row, w_h and w_t are the shares of sum |p - q| on the teacher's
head (the largest outcome, and those whose cumulative mass stays within mu = 0.5) and on the rest,
taken as constants, as in the authors' code. Here the tail outcome always belongs to the rest.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

DivergenceName = Literal[
    "forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "adaptive_kl", "tv"
]
TailName = Literal["bucket", "truncate", "renormalise", "sampled"]

LOG_ZERO = -1e4
"""Log-probability that stands for zero: its exp() is 0 in every dtype, and products stay finite."""
LOG_TAIL_FLOOR = -24 * math.log(2.0)
"""A tail mass is a difference from 1 and fp32 cannot tell it from 0 below 2^-24; reverse
divergences, which divide by it, see this instead of infinity."""
HEAD_MASS = 0.5


@dataclass(frozen=True, slots=True)
class Objective:
    """What a row's loss is: temperature^2 * divergence + ce_weight * cross-entropy."""

    divergence: DivergenceName = "forward_kl"
    beta: float = 0.5
    alpha: float = 0.1
    tail: TailName = "bucket"
    temperature: float = 1.0
    ce_weight: float = 0.0
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class Outcomes:
    """The teacher's side of some rows.

    Attributes:
        p: [rows, k + 1] probabilities, 0 where not counted.
        log_p: [rows, k + 1] their logs, finite everywhere.
        counted: bool [rows, k + 1]; False for padding and for a tail that is left out. None where
            there is no tail's column and all outcomes count: the list is the whole vocabulary.
    """

    p: Tensor
    log_p: Tensor
    counted: Tensor | None

    @property
    def log_p_above_floor(self) -> Tensor:
        """log_p for divergences that divide by p: the tail's is at least `LOG_TAIL_FLOOR`."""
        if self.counted is None:
            return self.log_p
        return torch.cat([self.log_p[:, :-1], self.log_p[:, -1:].clamp(min=LOG_TAIL_FLOOR)], 1)


def teacher_outcomes(
    ids: Tensor, logprobs: Tensor, tail: TailName, vocabulary: int, dtype: torch.dtype
) -> Outcomes:
    """Outcomes of the teacher under a tail treatment.

    Args:
        ids: [rows, k]; negative ids are padding.
        logprobs: [rows, k] full-softmax log-probabilities, nats.
        tail: `bucket`, `truncate` or `renormalise` (`sampled` is `truncate` over a longer list).
        vocabulary: number of real words; a row that names them all has no tail outcome, and a row
            that names none has no outcome at all.
        dtype: dtype of the result.
    """
    valid = ids >= 0
    log_p = logprobs.to(dtype).masked_fill(~valid, LOG_ZERO).clamp(min=LOG_ZERO)
    # Summed in fp64: the tail is what is left of 1, and fp32 would leave rounding.
    mass = log_p.double().exp().sum(1, keepdim=True)
    if tail == "renormalise":
        log_p = log_p - mass.clamp(min=1e-300).log().to(dtype) * valid
    rest = (1 - mass).clamp(min=0) if tail == "bucket" else torch.zeros_like(mass)  # [rows, 1]
    log_rest = rest.log().clamp(min=LOG_ZERO).to(dtype)
    named = valid.sum(1, keepdim=True)  # [rows, 1]
    has_tail = (named < vocabulary) & (named > 0) & (tail != "truncate")
    counted = torch.cat([valid, has_tail], 1)
    p = torch.cat([log_p.exp(), rest.to(dtype)], 1) * counted
    return Outcomes(p, torch.cat([log_p, log_rest], 1), counted)


class Terms(NamedTuple):
    """What every outcome adds, [rows, k + 1] each; 0 where not counted.

    Attributes:
        value: f(p_m, q_m), differentiable in log q.
        slope: r_m = q_m df/dq_m.
    """

    value: Tensor
    slope: Tensor


def terms(objective: Objective, teacher: Outcomes, log_q: Tensor, q: Tensor | None = None) -> Terms:
    """The table of this module, for log-probabilities of the student [rows, k + 1].

    Args:
        q: exp(log_q), where the caller has it.
    """
    p, log_p = teacher.p, teacher.log_p
    q = log_q.exp() if q is None else q
    q = q if teacher.counted is None else q * teacher.counted
    a, b = objective.alpha, objective.beta
    match objective.divergence:
        case "forward_kl":
            return Terms(p * (log_p - log_q), -p)
        case "reverse_kl":
            value = q * (log_q - teacher.log_p_above_floor)
            return Terms(value, value + q)
        case "jsd":
            log_m = torch.lerp(q, p, b).clamp(min=torch.finfo(q.dtype).tiny).log()
            above = (log_q - log_m) * q * (1 - b)
            return Terms(torch.addcmul(above, log_p - log_m, p, value=b), above)
        case "skew_forward_kl":
            log_m = _log_mixture(a, log_p, log_q)
            return Terms(p * (log_p - log_m), (a - 1) * p * (log_q - log_m).exp())
        case "skew_reverse_kl":
            log_ratio = log_q - _log_mixture(a, log_q, log_p)
            return Terms(q * log_ratio, q * (log_ratio + 1 - a * log_ratio.exp()))
        case "adaptive_kl":
            head = head_share(teacher, q.detach())
            reverse = (1 - head) * q * (log_q - teacher.log_p_above_floor)
            value = head * p * (log_p - log_q) + reverse
            return Terms(value, reverse + (1 - head) * q - head * p)
        case "tv":
            return Terms((p - q).abs() / 2, q * (q - p).sign() / 2)
    raise ValueError(f"divergence: {objective.divergence!r} is unknown")


def outcome_gradient(slope: Tensor, q: Tensor) -> Tensor:
    """r_m - q_m R [rows, k + 1]; the last column is A, the tail's share of the gradient.

    R is taken out twice. Where q is nearly all in one outcome, r_c - q_c R is a difference of two
    almost equal numbers and keeps only their rounding; as sum_m q_m is 1, the sum of what is left
    says how much that is, and taking it out again restores the digits of saturated rows.
    """
    r = torch.addcmul(slope, q, slope.sum(1, keepdim=True), value=-1)
    return r.addcmul_(q, r.sum(1, keepdim=True), value=-1)


def _log_mixture(weight: float, log_a: Tensor, log_b: Tensor) -> Tensor:
    """log(weight a + (1 - weight) b)."""
    return torch.logaddexp(log_a + math.log(weight), log_b + math.log1p(-weight))


def head_share(teacher: Outcomes, q: Tensor) -> Tensor:
    """AKL's w_h [rows, 1]: the head's share of sum |p - q|; 1/2 where p = q."""
    gap = (teacher.p - q).abs()  # [rows, k + 1]
    listed = teacher.p if teacher.counted is None else teacher.p[:, :-1]  # without the tail
    head = (gap[:, : listed.shape[1]] * _head(listed)).sum(1, keepdim=True)
    total = gap.sum(1, keepdim=True)
    return torch.where(total > 0, head / total.clamp(min=1e-30), 0.5)


def _head(p: Tensor) -> Tensor:
    """Membership of the head [rows, k]: largest outcome, then while cumulative mass <= mu."""
    falling, order = p.sort(dim=1, descending=True, stable=True)
    first = torch.arange(p.shape[1], device=p.device) == 0
    within = (falling.cumsum(1) <= HEAD_MASS) | first
    return torch.zeros_like(p).scatter_(1, order, within.to(p.dtype))
