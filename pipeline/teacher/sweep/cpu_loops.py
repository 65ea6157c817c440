"""The compiled inner loops of `sweep_cpu`: one row, already in cache, one small loop at a time.

One idea: each loop is short enough for the compiler to vectorise whole (16 logits an instruction
where the processor has AVX-512). They know nothing of signals, columns or threads.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic as typed_intrinsic

from stillroom.cache_schemas.kernels import compiled
from stillroom.pipeline.teacher.rows import ROUNDING

BLOCK = 64
"""Logits in one block: a candidate search skips it whole, a draw searches inside it."""
PIECE = 16 * BLOCK
"""Logits in one piece: single-precision sums run over a piece, double over pieces."""
GONE = np.float32(-1e9)
"""Stands at the top-k's places while the tail is summed; its exponential is 0."""
FAINT = 1e-20
"""A tail below this share of the peak is summed again from its own peak."""
FAST = {"nnan", "ninf", "nsz", "arcp", "contract", "reassoc"}

intrinsic: Any = typed_intrinsic


@intrinsic
def _float_of_bits(_context, bits):
    """float32 with the bits of an int32."""

    def generate(_context, builder, _signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def _bits_of_float(_context, number):
    """int32 with the bits of a float32."""

    def generate(_context, builder, _signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


def _power_of_two() -> tuple[np.float32, ...]:
    """Coefficients of 2^f on [-1/2, 1/2], near-minimax (Chebyshev), relative error 2e-8."""
    nodes = np.cos((np.arange(64) + 0.5) * np.pi / 64) / 2
    return tuple(np.polynomial.polynomial.polyfit(nodes, np.exp2(nodes), 6).astype(np.float32))


_C0, _C1, _C2, _C3, _C4, _C5, _C6 = _power_of_two()
_LOG2E = 1.4426950408889634
_HALF, _FLOOR = np.float32(0.5), np.float32(-127.0)
_ONE, _ZERO = np.float32(1.0), np.float32(0.0)


@njit(fastmath=FAST, inline="always")
def _exp2(y):
    """2^y for y <= 0 in single precision; 0 below 2^-126.5, where the exponent's bits run out."""
    y = max(y, _FLOOR)
    n = np.floor(y + _HALF)
    f = y - n
    p = _C6  # Horner's scheme
    p = p * f + _C5
    p = p * f + _C4
    p = p * f + _C3
    p = p * f + _C2
    p = p * f + _C1
    p = p * f + _C0
    return p * _float_of_bits((np.int32(n) + np.int32(127)) << np.int32(23))


@compiled(fastmath=FAST)
def widen(source, shift, bits):
    """Copy a row into the bits of a float32 buffer; False if a logit is NaN or infinite."""
    bad = np.int32(0)
    exponent = np.int32(0x7F800000)
    for i in range(source.shape[0]):
        wide = np.int32(source[i]) << shift
        bits[i] = wide
        bad |= np.int32((wide & exponent) == exponent)
    return bad == 0


@compiled(fastmath=FAST)
def first_sweep(z, vocab_size, token, maxima):
    """Block maxima; mean and population standard deviation; how many logits are above `token`.

    One small loop for each, piece by piece, because that is what the compiler vectorises.
    """
    shift = z[0]  # one of the logits, so that their squares do not swamp their spread
    above = np.int32(0)
    total, squares = 0.0, 0.0
    for start in range(0, vocab_size, PIECE):
        piece = z[start : start + PIECE]
        _maxima(piece, maxima[start // BLOCK : (start + PIECE) // BLOCK])
        piece = piece[: min(PIECE, vocab_size - start)]
        first, second = _ZERO, _ZERO
        for i in range(len(piece)):
            above += np.int32(piece[i] > token)
        for i in range(len(piece)):
            d = piece[i] - shift
            first += d
            second += d * d
        total += first
        squares += second
    offset = total / vocab_size
    variance = max(squares / vocab_size - offset * offset, 0.0)
    return shift + offset, np.sqrt(variance), above


@compiled(fastmath=FAST)
def _maxima(piece, maxima):
    for block in range(len(maxima)):
        inside = piece[block * BLOCK : (block + 1) * BLOCK]
        largest = GONE
        for i in range(BLOCK):
            largest = max(largest, inside[i])
        maxima[block] = largest


@compiled
def candidates(z, vocab_size, maxima, k, keys):
    """Sort keys of every logit that may be among the top k; returns how many there are."""
    if k == 0:
        return 0
    num_blocks = (vocab_size + BLOCK - 1) // BLOCK
    bound = GONE
    if num_blocks >= k:
        # The k-th largest block maximum: k logits reach it, so nothing below is among the top k.
        bound = np.partition(maxima[:num_blocks], num_blocks - k)[num_blocks - k]
    count = 0
    for block in range(num_blocks):
        if maxima[block] < bound:
            continue
        for i in range(block * BLOCK, min((block + 1) * BLOCK, vocab_size)):
            if z[i] >= bound:
                keys[count] = _key_of(z[i], i)
                count += 1
    return count


@njit(inline="always")
def _key_of(logit, i):
    """int64 that rises with the logit and, at ties, falls with the id: see `definition.top_k`."""
    bits = np.int64(_bits_of_float(np.float32(logit + _ZERO)))
    if bits < 0:
        bits ^= np.int64(0x7FFFFFFF)
    return (bits << np.int64(32)) + (np.int64(0x7FFFFFFF) - np.int64(i))


@njit(inline="always")
def id_of(key):
    return np.int64(0x7FFFFFFF) - (key & np.int64(0xFFFFFFFF))


@compiled(fastmath=FAST)
def second_sweep(z, peak, inverse, sums, at_one):
    """Sum of exp((z - peak) / T) over the row, and at T = 1 also of exp(x) x and per block."""
    scale = np.float32(inverse * _LOG2E)
    total, weighted = 0.0, 0.0
    for start in range(0, len(z), PIECE):
        piece = z[start : start + PIECE]
        part = _ZERO
        if not at_one:
            for i in range(PIECE):
                part += _exp2((piece[i] - peak) * scale)
            total += part
            continue
        for block in range(PIECE // BLOCK):
            inside = piece[block * BLOCK : (block + 1) * BLOCK]
            mass, product = _ZERO, _ZERO
            for i in range(BLOCK):
                x = inside[i] - peak
                e = _exp2(x * scale)
                mass += e
                product += e * x
            sums[start // BLOCK + block] = mass
            total += mass
            weighted += product
    return total, weighted


@compiled
def draw(z, peak, sums, tail, mass, counter, key, draws, out):
    """Draws from what is left in z, in proportion to exp(z): see `definition.draw_tail`."""
    count = min(max(int(np.ceil(draws * mass - ROUNDING)), 1), draws)
    start = _uniform(key + counter * np.uint64(0x9E3779B97F4A7C15))
    out[:draws] = -1
    out[draws:] = 0
    scale = np.float32(_LOG2E)
    block, before, slot = 0, 0.0, -1  # of the running sum; points rise, so it is walked once
    for j in range(count):
        point = (start + j) / count * tail
        while block < len(sums) - 1 and before + sums[block] <= point:
            before += sums[block]
            block += 1
        i, reached, last = block * BLOCK, before, -1
        for i in range(block * BLOCK, (block + 1) * BLOCK):
            if z[i] == GONE:
                continue
            last = i  # where rounding lets a point outrun its block, it is the last id's
            reached += _exp2((z[i] - peak) * scale)
            if reached > point:
                break
        if slot >= 0 and out[slot] == last:
            out[draws + slot] += 1
        elif last >= 0:
            slot += 1
            out[slot] = last
            out[draws + slot] = 1


@njit(inline="always")
def _uniform(x):
    """(0, 1) from a counter: splitmix64, top 32 bits, midpoint (as in `definition.uniforms`)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return (np.float64(x >> np.uint64(32)) + 0.5) * 2.0**-32
