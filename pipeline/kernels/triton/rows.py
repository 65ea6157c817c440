"""What every Triton sweep does with one row of logits: cap, log-sum-exp, divergence, gradient.

One idea: the loops over a row and the closed forms stand here once, as functions that Triton
inlines into each kernel (`sweep`, `shard_sweep`, `dense_sweep`). Nothing here
knows about programs, barriers or where a row's teacher comes from.

Importing this module imports Triton.
"""
# Triton reads `if ... else` on constants as compile-time choices, and its values have no types.
# ruff: noqa: RET505
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportAssignmentType=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from stillroom.pipeline.kernels.vocabulary_shards import FAR_BELOW as FAR

FAR_BELOW = tl.constexpr(FAR)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

NUM_WARPS = 8
MOST_LANES = tl.constexpr(32 * NUM_WARPS)
"""A lane is a thread's own sum. Lanes meet once a row, so a loop over it has no barrier."""


def available(device: torch.device) -> bool:
    """Whether a kernel can run on a device: CUDA, or anything under Triton's interpreter."""
    return device.type == "cuda" or bool(triton.knobs.runtime.interpret)


INSTEAD = "impl='chunked' gives the same values without Triton"


def launch(
    kernel: Any,
    programs: int,
    buffer: Tensor,
    *arguments: Any,
    instead: str = INSTEAD,
    **options: Any,
) -> None:
    """Runs programs of a kernel on the device where the buffer, its first argument, lies.

    Triton launches on the current device, which with a head on `cuda:1` need not be that one.

    Raises:
        RuntimeError: Triton does not compile or start the kernel there; says what to do `instead`.
    """
    try:
        with torch.cuda.device_of(buffer):
            kernel[(programs,)](buffer, *arguments, **options)
    except TritonError as error:
        said = str(error).strip().splitlines()[-1:]
        raise RuntimeError(
            f"Triton {triton.__version__} does not run {kernel.__name__} on {buffer.device}"
            f" ({type(error).__name__}: {''.join(said)}); {instead}"
        ) from error


def registers(limit: int) -> dict[str, int]:
    """The option that limits a thread's registers, where Triton's backend has it: not for HIP."""
    return {} if torch.version.hip else {"maxnreg": limit}


def block_of(most: int, width: int) -> int:
    """Words of a block: a power of two, at most `most`, of which a row has one whole one or more,
    so that a small vocabulary computes little in vain (and tests meet both kinds of block)."""
    return min(most, 1 << max(width.bit_length() - 1, 0))


@triton.constexpr_function
def rest_of(block):
    """Words of a block of a row's masked rest: what is loaded value by value keeps a register each,
    and at most 2,047 words are computed in vain."""
    return min(block, 2048)


@triton.constexpr_function
def per_load(block, dtype):
    """Words that a thread loads at once: 16 bytes."""
    return min(128 // dtype.primitive_bitwidth, rest_of(block))


@triton.constexpr_function
def lanes_of(block, dtype):
    """Lanes of a row: as many threads as load words of a block of its rest."""
    return min(MOST_LANES.value, rest_of(block) // per_load(block, dtype))


@triton.jit
def cap(raw, softcap, CAPPED: tl.constexpr):
    """Soft-capped logits, and the cap's slope."""
    if CAPPED:
        bent = 1.0 - 2.0 / (tl.exp2(raw * (2.0 * LOG2_E / softcap)) + 1.0)
        return softcap * bent, 1.0 - bent * bent
    else:
        return raw, tl.full(raw.shape, 1.0, tl.float32)


@triton.jit
def lanes_and_words(values, LANES: tl.constexpr, PER: tl.constexpr):
    """[words] as [loads, lanes, words of a load]: who loads what already, so nothing moves."""
    return tl.reshape(values, (values.shape[0] // (LANES * PER), LANES, PER))


@triton.jit
def lane_sums(values, LANES: tl.constexpr, PER: tl.constexpr):
    """Sums [lanes] of the words of a block."""
    return tl.sum(tl.sum(lanes_and_words(values, LANES, PER), 2), 0)


@triton.jit
def empty_sums(LANES: tl.constexpr):
    """(shifts, totals) of no words: see `add`."""
    return tl.full((LANES,), FAR_BELOW, tl.float32), tl.full((LANES,), 0.0, tl.float32)


@triton.jit
def add(sums, z, largest, scale):
    """An online log-sum-exp in every lane, one block further: (shift, sum of 2^(scale z - shift)).

    Args:
        sums: shifts and totals [lanes].
        z: [loads, lanes, words of a load], of which `largest` [lanes] are the maxima.
        scale: log2(e) / T, which makes an exponential one multiply-add and one 2^x.

    The shift is a rounded product that is carried, never made again: fused into a difference
    (exact then) it would not cancel, and scale the total a little in every block.
    """
    shifts, totals = sums
    new = tl.maximum(shifts, largest * scale)
    powers = tl.exp2(tl.fma(z, scale, -new[None, :, None]))
    return new, totals * tl.exp2(shifts - new) + tl.sum(tl.sum(powers, 2), 0)


@triton.jit
def gathered(sums, peak, scale):
    """sum exp(x - x_peak) over all lanes, relative to the row's peak without its rounding."""
    shifts, totals = sums
    apart = tl.exp2(tl.fma(-peak, scale, shifts))
    return tl.sum(tl.where(totals == 0, 0.0, totals * apart), 0)


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
    scale,
    softcap,
    CAPPED: tl.constexpr,
    PLAIN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """(largest z, sum exp((z - largest) / T), and the same sum at T = 1 where asked) over a row.

    Words whose logit is minus infinity count nothing; a row of nothing else has sum 0.
    """
    PER: tl.constexpr = per_load(BLOCK_V, logits.dtype.element_ty)
    LANES: tl.constexpr = lanes_of(BLOCK_V, logits.dtype.element_ty)
    REST: tl.constexpr = rest_of(BLOCK_V)
    peaks, none = empty_sums(LANES)
    state = (peaks, (peaks, none), (peaks, none))
    row = (logits, width, scale, softcap)
    whole = width // BLOCK_V * BLOCK_V
    for start in range(0, whole, BLOCK_V):
        words = start + tl.arange(0, BLOCK_V)
        state = _add_words(state, row, words, LANES, PER, CAPPED, PLAIN, True)
    for start in range(whole, width, REST):
        words = start + tl.arange(0, REST)
        state = _add_words(state, row, words, LANES, PER, CAPPED, PLAIN, False)
    peaks, sums, plain_sums = state
    peak = tl.max(peaks, 0)
    return peak, gathered(sums, peak, scale), gathered(plain_sums, peak, LOG2_E)


@triton.jit
def _add_words(
    state,
    row,
    words,
    LANES: tl.constexpr,
    PER: tl.constexpr,
    CAPPED: tl.constexpr,
    PLAIN: tl.constexpr,
    WHOLE: tl.constexpr,
):
    peaks, sums, plain_sums = state
    logits, width, scale, softcap = row
    z, _ = load(logits, words, width, softcap, CAPPED, WHOLE)
    z = lanes_and_words(z, LANES, PER)
    largest = tl.max(tl.max(z, 2), 0)
    if PLAIN:
        plain_sums = add(plain_sums, z, largest, LOG2_E)
    return tl.maximum(peaks, largest), add(sums, z, largest, scale), plain_sums


@triton.jit
def anchored(factor, peak, scale):
    """(shift, factor'): factor exp(x - x_peak) is factor' 2^(scale z - shift)."""
    shift = tl.where(peak > FAR_BELOW, peak, 0.0) * scale  # no word: all powers are 0
    return shift, factor * tl.exp2(tl.fma(-tl.where(peak > FAR_BELOW, peak, 0.0), scale, shift))


@triton.jit
def write_tail(
    logits,
    width,
    scale,
    softcap,
    peak,
    factor,
    plain_factor,
    CAPPED: tl.constexpr,
    PLAIN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Overwrites a row with factor exp((z - peak) / T) (+ plain_factor exp(z - peak)), times the
    cap's slope; 0 where the logit is minus infinity. A thread stores what it alone has loaded."""
    shift, factor = anchored(factor, peak, scale)
    plain_shift, plain_factor = anchored(plain_factor, peak, LOG2_E)
    how = (scale, softcap, shift, factor, plain_shift, plain_factor)
    whole = width // BLOCK_V * BLOCK_V
    for start in range(0, whole, BLOCK_V):
        _write_words(logits, start + tl.arange(0, BLOCK_V), width, how, CAPPED, PLAIN, True)
    REST: tl.constexpr = rest_of(BLOCK_V)
    for start in range(whole, width, REST):
        _write_words(logits, start + tl.arange(0, REST), width, how, CAPPED, PLAIN, False)


@triton.jit
def _write_words(
    logits, words, width, how, CAPPED: tl.constexpr, PLAIN: tl.constexpr, WHOLE: tl.constexpr
):
    scale, softcap, shift, factor, plain_shift, plain_factor = how
    z, slope = load(logits, words, width, softcap, CAPPED, WHOLE)
    gradient = factor * tl.exp2(tl.fma(z, scale, -shift))
    if PLAIN:
        gradient += plain_factor * tl.exp2(tl.fma(z, LOG2_E, -plain_shift))
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
