"""Loops that decode top-k rows: streams back to levels, ids and log-probabilities.

One idea: the inverse of `topk`, stream by stream, where four interleaved gaps are summed at once
through a table. It trusts nothing that comes from stored bytes: functions return (code, row), code
0 is success. Encoding is not here.
"""

import math

import numpy as np

from stillroom.cache_schemas.kernels import compiled
from stillroom.cache_schemas.kernels.topk import (
    BAD_LEVEL,
    BAD_RANK,
    LOG_2,
    MASS_BITS,
    NUM_QUAD_STREAMS,
    QUAD_STARTS,
    SINGLE_GAPS,
)


@compiled
def every_fourth_bit(x):
    """Bits 0, 4, 8 .. 60 of a uint64, moved together."""
    x &= np.uint64(0x1111111111111111)
    x = (x | x >> np.uint64(3)) & np.uint64(0x0303030303030303)
    x = (x | x >> np.uint64(6)) & np.uint64(0x000F000F000F000F)
    x = (x | x >> np.uint64(12)) & np.uint64(0x000000FF000000FF)
    return (x | x >> np.uint64(24)) & np.uint64(0xFFFF)


SMALL_QUADS = 1 << 12
"""Quads below this have no gap above 7."""


@compiled
def running_sums():
    """uint32 [SMALL_QUADS]: the four running sums of a quad's gaps, one byte each."""
    sums = np.empty(SMALL_QUADS, dtype=np.uint32)
    for quad in range(SMALL_QUADS):
        total, packed = np.uint64(0), np.uint64(0)
        for j in range(4):
            total += every_fourth_bit(np.uint64(quad) >> np.uint64(j))
            packed |= total << np.uint64(8 * j)
        sums[quad] = packed
    return sums


@compiled
def merge_levels(first, next_three, quads, quad_at, counts, last_level, sums, levels):
    """Fill levels [R, k] (uint32) from the gap streams, which are as long as `counts` ask for.

    `quads` holds the three interleaved streams one after another from `quad_at` [3]; `sums` is
    `running_sums()`.
    """
    at = np.uint64(0)
    for t in range(np.uint64(levels.shape[0])):
        n = np.uint64(counts[t])
        row = levels[t]
        level = np.uint64(0)
        if n > 0:
            level = np.uint64(first[t])
            row[np.uint64(0)] = level
        for r in range(np.uint64(1), min(n, np.uint64(SINGLE_GAPS))):
            level += np.uint64(next_three[at])
            at += np.uint64(1)
            row[r] = level
        for stream in range(NUM_QUAD_STREAMS):
            begin = np.uint64(QUAD_STARTS[stream])
            end = min(n, np.uint64(QUAD_STARTS[stream + 1]))
            if begin < end:
                quad_index = np.uint64(quad_at[stream])
                full = begin + (end - begin) // np.uint64(4) * np.uint64(4)
                for r in range(begin, full, np.uint64(4)):
                    quad = np.uint64(quads[quad_index])
                    quad_index += np.uint64(1)
                    if quad < np.uint64(SMALL_QUADS):
                        four = np.uint64(sums[quad])
                        row[r] = level + (four & np.uint64(255))
                        row[r + np.uint64(1)] = level + (four >> np.uint64(8) & np.uint64(255))
                        row[r + np.uint64(2)] = level + (four >> np.uint64(16) & np.uint64(255))
                        level += four >> np.uint64(24)
                        row[r + np.uint64(3)] = level
                        continue
                    level += every_fourth_bit(quad)
                    row[r] = level
                    level += every_fourth_bit(quad >> np.uint64(1))
                    row[r + np.uint64(1)] = level
                    level += every_fourth_bit(quad >> np.uint64(2))
                    row[r + np.uint64(2)] = level
                    level += every_fourth_bit(quad >> np.uint64(3))
                    row[r + np.uint64(3)] = level
                if full < end:
                    quad = np.uint64(quads[quad_index])
                    quad_index += np.uint64(1)
                    for j in range(end - full):
                        level += every_fourth_bit(quad >> np.uint64(j))
                        row[full + np.uint64(j)] = level
                quad_at[stream] = np.int64(quad_index)
        if level > last_level:
            return BAD_LEVEL, np.int64(t)
    return 0, -1


@compiled
def merge_ids(steps, levels, counts, bases, lookup, length, num_ranks, ids):
    """Fill ids [R, k]; a rank below `length` is `lookup[bases[t] + rank]`, another
    `lookup[rank - length]`. `steps` is as long as `counts` ask for."""
    k = np.uint64(ids.shape[1])
    ranks = np.empty(ids.shape[1], dtype=np.uint32)
    at = np.uint64(0)
    common = np.uint32(0) - np.uint32(length)  # minus the length: unsigned sums wrap
    for t in range(np.uint64(ids.shape[0])):
        n = np.uint64(counts[t])
        rank, largest, before = np.uint32(0), np.uint32(0), np.uint32(0xFFFFFFFF)
        for r in range(n):
            level = levels[t, r]
            rank = np.uint32(np.uint32(steps[at + r]) + (rank if level == before else np.uint32(0)))
            before = level
            ranks[r] = rank
            largest = max(largest, rank)
        at += n
        if largest >= np.uint32(num_ranks):
            return BAD_RANK, np.int64(t)
        base = np.uint32(bases[t])
        for r in range(n):
            small = ranks[r]
            ids[t, r] = lookup[np.uint32(small + (base if small < np.uint32(length) else common))]
        for r in range(n, k):
            ids[t, r] = -1
    return 0, -1


@compiled
def merge_logprobs(levels, tail_levels, counts, table, masses, normalise, logprobs, tail, shifts):
    """Fill logprobs [R, k] and tail [R] (empty: none) from levels known to be in the table, and
    shifts [R]: what was taken away so that a row sums to one.

    `masses` are the probabilities of `table` in units of 2**-MASS_BITS: integers, so that their
    sum does not depend on the order in which a machine adds.
    """
    k = np.uint64(logprobs.shape[1])
    with_tail = tail.size > 0
    for t in range(np.uint64(logprobs.shape[0])):
        n = np.uint64(counts[t])
        mass = np.int64(0)
        shifts[t] = 0.0
        for r in range(n):
            level = np.uint64(levels[t, r])
            mass += masses[level]
            logprobs[t, r] = table[level]
        if with_tail:
            level = np.uint64(tail_levels[t])
            mass += masses[level]
            tail[t] = table[level]
            if normalise and mass > 0:
                shift = np.float32(math.log(mass) - MASS_BITS * LOG_2)  # log of the row's sum
                shifts[t] = shift
                tail[t] -= shift
                for r in range(n):
                    logprobs[t, r] -= shift
        for r in range(n, k):
            logprobs[t, r] = -np.inf


@compiled
def list_entropy(levels, counts, logprobs, shifts, table, probabilities, entropy):
    """Fill entropy [R] (float64): -sum p log p over the entries, nats.

    p = exp(log p) without an exponential for each: log p is a level's value (probability known)
    less the row's shift, but for a rounding error, whose exponential is its series.
    """
    for t in range(np.uint64(logprobs.shape[0])):
        shift, total = np.float64(shifts[t]), 0.0
        scale = math.exp(-shift)
        for r in range(np.uint64(counts[t])):
            level = np.uint64(levels[t, r])
            probability = probabilities[level]
            if probability > 0.0:
                logprob = np.float64(logprobs[t, r])
                rounding = logprob - (np.float64(table[level]) - shift)
                total -= probability * logprob * (1.0 + rounding + 0.5 * rounding * rounding)
        entropy[t] = scale * total
