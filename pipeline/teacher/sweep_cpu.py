"""The CPU sweep: every logit signal of a row while that row stays in cache.

One idea: a row of logits is read from memory once, widened into a buffer that fits the second-level
cache, and swept there twice. The first sweep finds block maxima, moments and the token's rank; the
k-th largest block maximum is a lower bound on the k-th largest logit, so only the few blocks above
it are searched for the top k. With the top k taken out, the second sweep sums exponentials at every
temperature (the z-score log-sum-exp is one more temperature, T = std), so the tail's mass is summed
and never a difference of nearly equal numbers; draws from the tail invert the block sums.

Plain compiled loops (numba), one thread per stripe of rows, no lock held. `sweep.sweep` is the
definition that this file is tested against.
"""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic as typed_intrinsic

from pipeline.teacher.rows import RowSpec

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

_CPUS = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
"""Taken at import: vLLM later pins this thread, and threads inherit that."""


def sweep_cpu(
    logits: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor, key: int, spec: RowSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as `sweep.sweep`, for logits in main memory.

    A row with a NaN or infinite logit gets NaN in all of its floats.
    """
    rows = _as_array(logits)
    num_rows = len(rows)
    ints = np.empty((num_rows, spec.int_columns), dtype=np.int32)
    floats = np.empty((num_rows, spec.float_columns), dtype=np.float32)
    counters = (positions.numpy().astype(np.uint64) << np.uint64(10)) + np.uint64(1)
    temperatures = np.array(spec.temperatures, dtype=np.float64)
    numbers = (targets.numpy(), counters, np.uint64(key), spec.k, spec.draws, temperatures)
    flags = (spec.entropy, spec.moments)
    stripes = min(torch.get_num_threads(), num_rows)
    bounds = [num_rows * i // stripes for i in range(stripes + 1)]
    others = [
        _pool().submit(_stripe, rows, *numbers, *flags, ints, floats, first, last)
        for first, last in itertools.pairwise(bounds[1:])
    ]
    _stripe(rows, *numbers, *flags, ints, floats, 0, bounds[1])
    for other in others:
        other.result()
    return torch.from_numpy(ints), torch.from_numpy(floats)


def _as_array(logits: torch.Tensor) -> np.ndarray:
    """[R, V] bits: bfloat16 as uint16, anything else as float32 in int32; copies if it must."""
    if logits.dtype == torch.bfloat16:
        return logits.view(torch.int16).numpy().view(np.uint16)
    return logits.float().view(torch.int32).numpy()


@cache
def _pool() -> ThreadPoolExecutor:
    """Threads that may run on every processor this program was given."""

    def unpin():
        if _CPUS:
            os.sched_setaffinity(0, _CPUS)

    return ThreadPoolExecutor(max(1, len(_CPUS)), "sweep", initializer=unpin)


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
    p = _C6
    p = p * f + _C5
    p = p * f + _C4
    p = p * f + _C3
    p = p * f + _C2
    p = p * f + _C1
    p = p * f + _C0
    return p * _float_of_bits((np.int32(n) + np.int32(127)) << np.int32(23))


@njit(nogil=True, cache=True)
def _stripe(
    rows,
    targets,
    counters,
    key,
    k,
    draws,
    temperatures,
    entropy,
    moments,
    ints,
    floats,
    first,
    last,
):
    """Sweep rows first .. last-1 with one set of buffers."""
    vocab_size = rows.shape[1]
    num_pieces = (vocab_size + PIECE - 1) // PIECE
    padded = num_pieces * PIECE
    shift = np.int32(32 - 8 * rows.itemsize)
    z = np.full(padded, GONE, dtype=np.float32)
    maxima = np.empty(padded // BLOCK, dtype=np.float32)
    sums = np.empty(padded // BLOCK, dtype=np.float32)
    keys = np.empty(vocab_size, dtype=np.int64)
    for row in range(first, last):
        finite = _widen(rows[row], shift, z.view(np.int32))
        if not finite:
            ints[row] = 0
            floats[row] = np.nan
            continue
        _sweep_row(
            z, vocab_size, targets[row], counters[row], key, k, draws, temperatures,
            entropy, moments, ints[row], floats[row], maxima, sums, keys,
        )  # fmt: skip


@njit(fastmath=FAST, cache=True)
def _widen(source, shift, bits):
    """Copy a row into the bits of a float32 buffer; False if a logit is NaN or infinite."""
    bad = np.int32(0)
    exponent = np.int32(0x7F800000)
    for i in range(source.shape[0]):
        wide = np.int32(source[i]) << shift
        bits[i] = wide
        bad |= np.int32((wide & exponent) == exponent)
    return bad == 0


@njit(cache=True)
def _sweep_row(
    z, vocab_size, target, counter, key, k, draws, temperatures, entropy, moments,
    ints, floats, maxima, sums, keys,
):  # fmt: skip
    """All signals of the row in z, which ends with the top k taken out."""
    num_temperatures = len(temperatures)
    token = z[target]
    mean, std, above = _first_sweep(z, vocab_size, token, maxima)
    count = _candidates(z, vocab_size, maxima, k, keys)
    top = np.sort(keys[:count])[::-1][:k]
    ids = ints[:k]
    peak = z[_id_of(top[0])]
    exact = np.empty(k, dtype=np.float32)
    for j in range(k):
        ids[j] = _id_of(top[j])
        exact[j] = z[ids[j]]
    for j in range(k):
        z[ids[j]] = GONE
    lse_1, tail_1 = 0.0, 0.0
    for t in range(num_temperatures):
        temperature = temperatures[t]
        tail, weighted = _second_sweep(z, peak, 1.0 / temperature, sums, temperature == 1.0)
        total = tail
        for j in range(k):
            total += np.exp((exact[j] - peak) / temperature)
        floats[k + 2 + t] = peak / temperature + np.log(total)
        if temperature == 1.0:
            lse_1 = np.log(total)
            for j in range(k):
                weighted += np.exp(np.float64(exact[j] - peak)) * (exact[j] - peak)
            if entropy:
                floats[k + 2 + num_temperatures] = lse_1 - weighted / total
            tail_peak = peak
            if tail < FAINT:
                tail_peak = z[:vocab_size].max()
                tail, _ = _second_sweep(z, tail_peak, 1.0, sums, True)
            tail_1 = np.log(tail) + (tail_peak - peak)
            if draws:
                _draw(z, tail_peak, sums, tail, counter, key, draws, ints[k : k + 2 * draws])
    for j in range(k):
        floats[j] = exact[j] - peak - lse_1
    floats[k] = tail_1 - lse_1
    floats[k + 1] = token - peak - lse_1
    ints[k + 2 * draws] = 1 + above
    if moments:
        scale = 1e-7 + std
        total, _ = _second_sweep(z, peak, 1.0 / scale, sums, False)
        for j in range(k):
            total += np.exp((exact[j] - peak) / scale)
        at = k + 2 + num_temperatures + np.int64(entropy)
        floats[at], floats[at + 1] = mean, std
        floats[at + 2] = (peak - mean) / scale + np.log(total)


@njit(fastmath=FAST, cache=True)
def _first_sweep(z, vocab_size, token, maxima):
    """Block maxima; mean and population standard deviation; how many logits are above `token`.

    One small loop for each, piece by piece, because that is what the compiler vectorises.
    """
    shift = z[0]
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


@njit(fastmath=FAST, cache=True)
def _maxima(piece, maxima):
    for block in range(len(maxima)):
        inside = piece[block * BLOCK : (block + 1) * BLOCK]
        largest = GONE
        for i in range(BLOCK):
            largest = max(largest, inside[i])
        maxima[block] = largest


@njit(cache=True)
def _candidates(z, vocab_size, maxima, k, keys):
    """Sort keys of every logit that may be among the top k; returns how many there are."""
    num_blocks = (vocab_size + BLOCK - 1) // BLOCK
    bound = GONE
    if num_blocks >= k:
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
    """int64 that rises with the logit and, at ties, falls with the id (as in `sweep.top_k`)."""
    bits = np.int64(_bits_of_float(np.float32(logit + _ZERO)))
    if bits < 0:
        bits ^= np.int64(0x7FFFFFFF)
    return (bits << np.int64(32)) + (np.int64(0x7FFFFFFF) - np.int64(i))


@njit(inline="always")
def _id_of(key):
    return np.int64(0x7FFFFFFF) - (key & np.int64(0xFFFFFFFF))


@njit(fastmath=FAST, cache=True)
def _second_sweep(z, peak, inverse, sums, at_one):
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


@njit(cache=True)
def _draw(z, peak, sums, tail, counter, key, draws, out):
    """Draws from what is left in z, in proportion to exp(z): see `sweep.draw_tail`."""
    points = np.empty(draws, dtype=np.float64)
    for j in range(draws):
        points[j] = _uniform(key + (counter + np.uint64(j)) * np.uint64(0x9E3779B97F4A7C15)) * tail
    points.sort()
    out[:draws] = -1
    out[draws:] = 0
    scale = np.float32(_LOG2E)
    block, before, slot = 0, 0.0, -1
    for j in range(draws):
        while block < len(sums) - 1 and before + sums[block] <= points[j]:
            before += sums[block]
            block += 1
        i, reached, last = block * BLOCK, before, -1
        for i in range(block * BLOCK, (block + 1) * BLOCK):
            if z[i] == GONE:
                continue
            last = i
            reached += _exp2((z[i] - peak) * scale)
            if reached > points[j]:
                break
        if slot >= 0 and out[slot] == last:
            out[draws + slot] += 1
        elif last >= 0:
            slot += 1
            out[slot] = last
            out[draws + slot] = 1


@njit(inline="always")
def _uniform(x):
    """(0, 1) from a counter: splitmix64, top 32 bits, midpoint (as in `sweep.uniforms`)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return (np.float64(x >> np.uint64(32)) + 0.5) * 2.0**-32
