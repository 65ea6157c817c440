"""The CPU sweep: every logit signal of a row while that row stays in cache.

One idea: a row of logits is read from memory once, widened into a buffer that fits the second-level
cache, and swept there twice. The first sweep finds block maxima, moments and the token's rank; the
k-th largest block maximum is a lower bound on the k-th largest logit, so only the few blocks above
it are searched for the top k. With the top k taken out, the second sweep sums exponentials at every
temperature (the z-score log-sum-exp is one more temperature, T = std), so the tail's mass is summed
and never a difference of nearly equal numbers; draws from the tail invert the block sums.

Plain compiled loops (numba), one thread per stripe of rows, no lock held. `definition.sweep` is the
definition that this file is tested against.
"""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch

from stillroom.cache_schemas.kernels import compiled
from stillroom.pipeline.teacher.rows import RowSpec
from stillroom.pipeline.teacher.sweep.cpu_loops import (
    BLOCK,
    FAINT,
    GONE,
    PIECE,
    candidates,
    draw,
    first_sweep,
    id_of,
    second_sweep,
    widen,
)

_CPUS = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
"""Taken at import: vLLM later pins this thread, and threads inherit that."""


def sweep_cpu(
    logits: torch.Tensor,
    targets: torch.Tensor,
    positions: torch.Tensor,
    key: int | torch.Tensor,
    spec: RowSpec,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as `definition.sweep`, for logits in main memory.

    A row with a NaN or infinite logit gets NaN in all of its floats.
    """
    rows = _as_array(logits)
    num_rows = len(rows)
    ints = np.empty((num_rows, spec.int_columns), dtype=np.int32)
    floats = np.empty((num_rows, spec.float_columns), dtype=np.float32)
    # As in `definition.uniforms`, in the unsigned numbers that it imitates.
    counters = (positions.numpy().astype(np.uint64) << np.uint64(10)) + np.uint64(1)
    given = key.numpy() if isinstance(key, torch.Tensor) else np.full(num_rows, key)
    keys = given.astype(np.uint64)
    temperatures = np.array(spec.temperatures, dtype=np.float64)
    numbers = (targets.numpy(), counters, keys, spec.k, spec.draws, temperatures)
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


@compiled
def _stripe(
    rows,
    targets,
    counters,
    keys,
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
    padded = num_pieces * PIECE  # whole pieces: every inner loop has a fixed length
    shift = np.int32(32 - 8 * rows.itemsize)  # bfloat16 is a float32's upper half
    z = np.full(padded, GONE, dtype=np.float32)  # what pads the row has no mass
    maxima = np.empty(padded // BLOCK, dtype=np.float32)  # of each block
    sums = np.empty(padded // BLOCK, dtype=np.float32)  # of each block
    near = np.empty(vocab_size, dtype=np.int64)  # sort keys of as many candidates as there may be
    for row in range(first, last):
        finite = widen(rows[row], shift, z.view(np.int32))
        if not finite:
            ints[row] = 0
            floats[row] = np.nan
            continue
        _sweep_row(
            z, vocab_size, targets[row], counters[row], keys[row], k, draws, temperatures,
            entropy, moments, ints[row], floats[row], maxima, sums, near,
        )  # fmt: skip


@compiled
def _sweep_row(
    z, vocab_size, target, counter, key, k, draws, temperatures, entropy, moments,
    ints, floats, maxima, sums, keys,
):  # fmt: skip
    """All signals of the row in z, which ends with the top k taken out."""
    num_temperatures = len(temperatures)
    token = z[target]
    mean, std, above = first_sweep(z, vocab_size, token, maxima)
    count = candidates(z, vocab_size, maxima, k, keys)
    top = np.sort(keys[:count])[::-1][:k]
    ids = ints[:k]
    peak = maxima.max()
    exact = np.empty(k, dtype=np.float32)
    for j in range(k):
        ids[j] = id_of(top[j])
        exact[j] = z[ids[j]]
    for j in range(k):
        z[ids[j]] = GONE
    lse_1, tail_1 = 0.0, 0.0  # relative to the peak, like `weighted`
    for t in range(num_temperatures):
        temperature = temperatures[t]
        tail, weighted = second_sweep(z, peak, 1.0 / temperature, sums, temperature == 1.0)
        total = tail
        for j in range(k):
            total += np.exp((exact[j] - peak) / temperature)
        floats[k + 2 + t] = peak / temperature + np.log(total)
        if temperature == 1.0:
            lse_1 = np.log(total)
            for j in range(k):
                weighted += np.exp(np.float64(exact[j] - peak)) * (exact[j] - peak)
            if entropy:
                floats[k + 2 + num_temperatures] = lse_1 - weighted / total  # log Z - E[z - peak]
            tail_peak = peak
            if tail < FAINT:
                tail_peak = z[:vocab_size].max()
                tail, _ = second_sweep(z, tail_peak, 1.0, sums, True)
            tail_1 = np.log(tail) + (tail_peak - peak)
            if draws:
                mass, drawn = np.exp(tail_1 - lse_1), ints[k : k + 2 * draws]
                draw(z, tail_peak, sums, tail, mass, counter, key, draws, drawn)
    for j in range(k):
        floats[j] = exact[j] - peak - lse_1
    floats[k] = tail_1 - lse_1
    floats[k + 1] = token - peak - lse_1
    ints[k + 2 * draws] = 1 + above
    if moments:
        scale = 1e-7 + std  # as in `definition`
        total, _ = second_sweep(z, peak, 1.0 / scale, sums, False)
        for j in range(k):
            total += np.exp((exact[j] - peak) / scale)
        at = k + 2 + num_temperatures + np.int64(entropy)
        floats[at], floats[at + 1] = mean, std
        floats[at + 2] = (peak - mean) / scale + np.log(total)
