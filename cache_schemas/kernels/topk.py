"""Loops that encode top-k rows: levels, ranking classes, streams. `topk_decoding` undoes them.

One idea: a row becomes gaps between levels, and, inside each group of equal levels, ascending ranks
stored as differences; order inside a group carries nothing, so it costs nothing. Gaps go to streams
by where in the row they stand, because pcodec gives each stream its own code; from the fifth on
four of them are interleaved bit by bit into one number, which unpacks four times as fast.
All functions are compiled (see the package) and return (code, row): code 0 is success.
"""

import math

import numpy as np

from stillroom.cache_schemas.kernels import compiled

# Parts of the format, compiled into `topk_decoding` and `places` too: numba's cache on disk does
# not see a change made here.
SINGLE_GAPS = 4
"""Gaps of ranks below this are numbers of their own: the first, then three more."""
QUAD_STARTS = (4, 16, 64, 1 << 30)
"""First rank of each stream of interleaved gaps."""
NUM_QUAD_STREAMS = 3

MASS_BITS = 40
LOG_2 = math.log(2.0)

BAD_ID, BAD_LOGPROB, BAD_PADDING, UNSORTED, BAD_LEVEL, BAD_RANK = 1, 2, 3, 4, 5, 6
SLACK = 1e-3
"""Nats by which a log-probability may exceed 0, for rounding by the teacher."""


MAX_CELLS = 1 << 16
"""Cells, at most, of the table from which the search for a level starts."""


@compiled
def coarse_levels(edges):
    """(uint16 levels, cells per nat): the level of a = i / cells, for all i within the codebook.

    A cell is no wider than a level where MAX_CELLS allows, so that the search ends at once. Cells
    per nat are a power of two, so that multiplying by it is exact.
    """
    narrow_enough = math.ceil(-math.log2(np.diff(edges).min()))
    per_nat = 2.0 ** min(narrow_enough, math.floor(math.log2(MAX_CELLS / edges[-1])))
    found = np.empty(int(edges[-1] * per_nat) + 1, dtype=np.uint16)
    level = 0
    for i in range(found.size):
        while level < edges.size - 2 and i / per_nat >= edges[level + 1]:
            level += 1
        found[i] = level
    return found, per_nat


@compiled
def level_of(a, edges, coarse, per_nat, last, end):
    """The level of a = -log p; of NaN it is any. `last` and `end` are the last level with a
    width and the last cell."""
    cell = min(a * per_nat, end)
    level = np.uint64(coarse[np.uint64(cell) if cell > 0 else np.uint64(0)])
    while level < last and a >= edges[level + np.uint64(1)]:
        level += np.uint64(1)
    return level + np.uint64(a == np.inf)


@compiled
def quantise(ids, logprobs, edges, coarse, per_nat, vocab_size, counts, levels):
    """Fill counts [R] (entries before the padding) and levels [R, k] (uint16)."""
    num_rows, k = ids.shape
    last, end = np.uint64(edges.size - 2), np.float64(coarse.size - 1)
    for t in range(num_rows):
        n = 0
        while n < k and ids[t, n] >= 0:
            n += 1
        counts[t] = n
        for r in range(n, k):
            if ids[t, r] != -1 or logprobs[t, r] != -np.inf:
                return BAD_PADDING, t
            levels[t, r] = 0
        largest, likely, sorted_ = np.int64(-1), True, True
        for r in range(n):
            largest = max(largest, np.int64(ids[t, r]))
            a = -np.float64(logprobs[t, r])
            likely &= a >= -SLACK
            sorted_ &= r == 0 or logprobs[t, r] <= logprobs[t, r - 1]
            levels[t, r] = level_of(a, edges, coarse, per_nat, last, end)
        if largest >= vocab_size:
            return BAD_ID, t
        if not likely:
            return BAD_LOGPROB, t
        if not sorted_:
            return UNSORTED, t
    return 0, -1


@compiled
def quantise_each(logprobs, edges, coarse, per_nat, levels):
    """Levels [R] of unrelated log-probabilities."""
    last, end = np.uint64(edges.size - 2), np.float64(coarse.size - 1)
    for t in range(logprobs.size):
        a = -np.float64(logprobs[t])
        if not a >= -SLACK:
            return BAD_LOGPROB, t
        levels[t] = level_of(a, edges, coarse, per_nat, last, end)
    return 0, -1


RANK_BIT, LEVEL_BIT = 16, 41
"""Where a sort key keeps rank and level; the place in the row is below."""


@compiled
def sort_keys(ids, levels, counts, classes, ranks, keys):
    """Fill keys [R, k] (uint64), whose order is that of levels, then of ranks; `ranks` is [classes,
    vocab]. Padding sorts last."""
    for t in range(ids.shape[0]):
        n = counts[t]
        rank_of = ranks[classes[t]]
        for r in range(n):
            rank = np.uint64(rank_of[ids[t, r]])
            level = np.uint64(levels[t, r])
            keys[t, r] = level << np.uint64(LEVEL_BIT) | rank << np.uint64(RANK_BIT) | np.uint64(r)
        keys[t, n:] = np.uint64(0xFFFFFFFFFFFFFFFF)


@compiled
def rank_steps(keys, ids, counts, steps, sorted_ids):
    """Fill the rank steps [sum(counts)] and the ids [R, k] in the order of the sorted keys.

    A step is the difference to the rank before it in the same level.
    """
    at = np.uint64(0)
    low = np.uint64((1 << (LEVEL_BIT - RANK_BIT)) - 1)
    for t in range(ids.shape[0]):
        n = counts[t]
        before = np.uint64(0)
        for r in range(n):
            key = keys[t, r]
            same = r > 0 and key >> np.uint64(LEVEL_BIT) == before >> np.uint64(LEVEL_BIT)
            rank = key >> np.uint64(RANK_BIT) & low
            steps[at] = rank - (before >> np.uint64(RANK_BIT) & low if same else np.uint64(0))
            at += np.uint64(1)
            before = key
            sorted_ids[t, r] = ids[t, key & np.uint64(0xFFFF)]  # the place in the row
        sorted_ids[t, n:] = -1


@compiled
def to_every_fourth_bit(x):
    """Bits 0 .. 15 of a uint64, moved to bits 0, 4, 8 .. 60: the inverse of `every_fourth_bit`."""
    x = (x | x << np.uint64(24)) & np.uint64(0x000000FF000000FF)
    x = (x | x << np.uint64(12)) & np.uint64(0x000F000F000F000F)
    x = (x | x << np.uint64(6)) & np.uint64(0x0303030303030303)
    return (x | x << np.uint64(3)) & np.uint64(0x1111111111111111)


@compiled
def level_gaps(levels, counts, single, quads, ends):
    """Fill the single gaps [2, 3 * R], the quads [3, R * ceil(k / 4)] and all five lengths."""
    for t in range(levels.shape[0]):
        n = counts[t]
        before = 0
        for r in range(min(n, SINGLE_GAPS)):
            stream = 0 if r == 0 else 1
            single[stream, ends[stream]] = levels[t, r] - before
            ends[stream] += 1
            before = levels[t, r]
        for stream in range(NUM_QUAD_STREAMS):
            for r in range(QUAD_STARTS[stream], min(n, QUAD_STARTS[stream + 1]), 4):
                quad = np.uint64(0)
                for j in range(min(4, n - r)):
                    gap = np.uint64(levels[t, r + j] - before)
                    before = levels[t, r + j]
                    quad |= to_every_fourth_bit(gap) << np.uint64(j)
                quads[stream, ends[2 + stream]] = quad
                ends[2 + stream] += 1


@compiled
def divergence(
    logprobs, tail, masses, levels, tail_levels, counts, table, normalise, kl, worst
):  # fmt: skip
    """KL(given || decoded) [R] over the entries and the tail, in nats, and max |delta log p| [R]
    over entries above the codebook's floor. `masses` [R, k] are exp(logprobs) in float64.

    The given row is normalised too, so that rounding by the teacher is not counted.
    """
    floor = table[table.size - 2]
    mass_of = np.exp(table.astype(np.float64))
    for t in range(logprobs.shape[0]):
        mass, stored, cross, largest = 0.0, 0.0, 0.0, 0.0
        for r in range(counts[t] + 1):
            inside = r < counts[t]
            a = np.float64(logprobs[t, r] if inside else tail[t])
            if a == -np.inf:
                continue
            p = masses[t, r] if inside else math.exp(a)
            level = levels[t, r] if inside else tail_levels[t]
            difference = a - np.float64(table[level])
            mass += p
            stored += mass_of[level]
            cross += p * difference
            if a > floor:
                largest = max(largest, abs(difference))
        shift = math.log(stored) if stored > 0 else 0.0  # nats
        kl[t] = cross / mass + shift - math.log(mass) if mass > 0 else 0.0
        worst[t] = largest + (abs(shift) if normalise else 0.0)


@compiled
def mean_divergence(logprobs, tail, edges):
    """Mean KL(given || stored at the centres of its levels) over rows, nats."""
    total, last = 0.0, edges.size - 2
    for t in range(logprobs.shape[0]):
        mass, stored, cross = 0.0, 0.0, 0.0
        for r in range(logprobs.shape[1] + 1):
            a = -np.float64(logprobs[t, r] if r < logprobs.shape[1] else tail[t])
            if not a >= -SLACK or a == np.inf:
                continue
            found = min(max(np.searchsorted(edges, a, side="right") - 1, 0), last)
            b = (edges[found] + edges[found + 1]) / 2
            mass += math.exp(-a)
            stored += math.exp(-b)
            cross += math.exp(-a) * (b - a)
        if mass > 0:
            total += cross / mass + math.log(stored / mass)
    return total / logprobs.shape[0]
