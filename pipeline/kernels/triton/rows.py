"""What every Triton sweep does with one row of logits: cap, log-sum-exp, divergence, gradient.

One idea: the loops over a row and the closed forms stand here once, as functions that Triton
inlines into each kernel (`sweep`, `shard_sweep`, `dense_sweep`). Nothing here
knows about programs, barriers or where a row's teacher comes from.

Importing this module imports Triton.
"""
# Triton reads `if ... else` on constants as compile-time choices, and its values have no types.
# ruff: noqa: RET505
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl

from stillroom.pipeline.kernels.vocabulary_shards import FAR_BELOW as FAR

FAR_BELOW = tl.constexpr(FAR)


def available(device: torch.device) -> bool:
    """Whether a kernel can run on a device: CUDA, or anything under Triton's interpreter."""
    return device.type == "cuda" or bool(triton.knobs.runtime.interpret)


def block_of(most: int, width: int) -> int:
    """Words of a block: a power of two, at most `most`, of which a row has one whole one or more,
    so that a small vocabulary computes little in vain (and tests meet both kinds of block)."""
    return min(most, 1 << max(width.bit_length() - 1, 0))


@triton.constexpr_function
def rest_blocks(block):
    """Blocks into which the masked rest of a row is cut: what is loaded value by value keeps a
    register each, and at most 2,047 words are computed in vain."""
    return max(block // 2048, 1)


@triton.jit
def cap(raw, softcap, CAPPED: tl.constexpr):
    """Soft-capped logits, and the cap's slope."""
    if CAPPED:
        bent = 1.0 - 2.0 / (tl.exp(2.0 * raw / softcap) + 1.0)
        return softcap * bent, 1.0 - bent * bent
    else:
        return raw, tl.full(raw.shape, 1.0, tl.float32)


@triton.jit
def add(peak, total, x):
    """An online log-sum-exp, one block further."""
    new = tl.maximum(peak, tl.max(x, 0))
    return new, total * tl.exp(peak - new) + tl.sum(tl.exp(x - new), 0)


@triton.jit
def load(logits, word, width, softcap, CAPPED: tl.constexpr, WHOLE: tl.constexpr):
    """Capped logits of a block of words, and the cap's slope: minus infinity beyond the vocabulary.

    A block that is WHOLE has no mask. The compiler cannot know that 16-byte words of a row end
    where a vocabulary does that 16 does not divide, and under a mask loads one value at a time.
    """
    if WHOLE:
        raw = tl.load(logits + word).to(tl.float32)
    else:
        raw = tl.load(logits + word, mask=word < width, other=float("-inf")).to(tl.float32)
    bent, slope = cap(raw, softcap, CAPPED)
    return tl.where(raw == float("-inf"), raw, bent), slope


@triton.jit
def store(logits, word, value, width, WHOLE: tl.constexpr):
    """Writes a block of a row in its dtype; see `load`."""
    if WHOLE:
        tl.store(logits + word, value.to(logits.dtype.element_ty))
    else:
        tl.store(logits + word, value.to(logits.dtype.element_ty), mask=word < width)


@triton.jit
def tail_sums(
    logits,
    width,
    cold,
    softcap,
    CAPPED: tl.constexpr,
    PLAIN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """(peak, sum exp(x - peak)) over a row, and the same of z where asked: one online pass.

    Words whose logit is minus infinity count nothing; a row of nothing else has sum 0.
    """
    peak, total = tl.full((), FAR_BELOW, tl.float32), tl.full((), 0.0, tl.float32)
    sums = (peak, total, peak, total)
    whole = width // BLOCK_V * BLOCK_V
    for start in range(0, whole, BLOCK_V):
        words = start + tl.arange(0, BLOCK_V)
        sums = _add_words(sums, logits, words, width, cold, softcap, CAPPED, PLAIN, True)
    REST: tl.constexpr = BLOCK_V // rest_blocks(BLOCK_V)
    for start in range(whole, width, REST):
        words = start + tl.arange(0, REST)
        sums = _add_words(sums, logits, words, width, cold, softcap, CAPPED, PLAIN, False)
    return sums


@triton.jit
def _add_words(
    sums,
    logits,
    words,
    width,
    cold,
    softcap,
    CAPPED: tl.constexpr,
    PLAIN: tl.constexpr,
    WHOLE: tl.constexpr,
):
    peak, total, plain_peak, plain_total = sums
    z, _ = load(logits, words, width, softcap, CAPPED, WHOLE)
    peak, total = add(peak, total, z * cold)
    if PLAIN:
        plain_peak, plain_total = add(plain_peak, plain_total, z)
    return peak, total, plain_peak, plain_total


@triton.jit
def write_tail(
    logits,
    width,
    cold,
    softcap,
    scale,
    peak,
    plain_scale,
    plain_peak,
    CAPPED: tl.constexpr,
    PLAIN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Overwrites a row with scale exp(x - peak) (+ plain_scale exp(z - plain_peak)), times the
    cap's slope; 0 where the logit is minus infinity. A thread stores what it alone has loaded."""
    how = (cold, softcap, scale, peak, plain_scale, plain_peak)
    whole = width // BLOCK_V * BLOCK_V
    for start in range(0, whole, BLOCK_V):
        _write_words(logits, start + tl.arange(0, BLOCK_V), width, how, CAPPED, PLAIN, True)
    REST: tl.constexpr = BLOCK_V // rest_blocks(BLOCK_V)
    for start in range(whole, width, REST):
        _write_words(logits, start + tl.arange(0, REST), width, how, CAPPED, PLAIN, False)


@triton.jit
def _write_words(
    logits, words, width, how, CAPPED: tl.constexpr, PLAIN: tl.constexpr, WHOLE: tl.constexpr
):
    cold, softcap, scale, peak, plain_scale, plain_peak = how
    z, slope = load(logits, words, width, softcap, CAPPED, WHOLE)
    gradient = scale * tl.exp(z * cold - peak)
    if PLAIN:
        gradient += plain_scale * tl.exp(z - plain_peak)
    store(logits, words, gradient * slope, width, WHOLE)


@triton.jit
def terms(log_p, floored, p, log_q, q, beta, alpha, head, DIVERGENCE: tl.constexpr):
    """f(p, q) and q df/dq: the table of `divergences`."""
    if DIVERGENCE == "forward_kl":
        return p * (log_p - log_q), -p
    elif DIVERGENCE == "reverse_kl":
        return q * (log_q - floored), q * (log_q - floored + 1)
    elif DIVERGENCE == "jsd":
        log_m = log_mixture(beta, log_p, log_q)
        above = (1 - beta) * q * (log_q - log_m)
        return beta * p * (log_p - log_m) + above, above
    elif DIVERGENCE == "skew_forward_kl":
        log_m = log_mixture(alpha, log_p, log_q)
        return p * (log_p - log_m), (alpha - 1) * p * tl.exp(log_q - log_m)
    elif DIVERGENCE == "skew_reverse_kl":
        ratio = log_q - log_mixture(alpha, log_q, log_p)
        return q * ratio, q * (ratio + 1 - alpha * tl.exp(ratio))
    elif DIVERGENCE == "adaptive_kl":
        reverse = (1 - head) * q * (log_q - floored)
        return head * p * (log_p - log_q) + reverse, reverse + (1 - head) * q - head * p
    else:
        tl.static_assert(DIVERGENCE == "tv")
        sign = tl.where(q > p, 1.0, tl.where(q < p, -1.0, 0.0))
        return tl.abs(p - q) / 2, q * sign / 2


@triton.jit
def log_mixture(weight, log_a, log_b):
    """log(weight a + (1 - weight) b)."""
    a, b = log_a + tl.log(weight), log_b + tl.log(1 - weight)
    high = tl.maximum(a, b)
    return high + tl.log(1 + tl.exp(tl.minimum(a, b) - high))
