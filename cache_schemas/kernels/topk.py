"""Loops over top-k rows: levels, ranking classes, streams, and their inverses.

One idea: a row becomes gaps between levels, and, inside each group of equal levels, ascending ranks
stored as differences; order inside a group carries nothing, so it costs nothing. Gaps go to streams
by where in the row they stand, because pcodec gives each stream its own code; from the fifth on
four of them are interleaved bit by bit into one number, which unpacks four times as fast.
All functions are compiled (see `cache_schemas.kernels`) and return (code, row): code 0 is success.
"""

import math

import numpy as np

from cache_schemas.kernels import compiled

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
            sorted_ids[t, r] = ids[t, key & np.uint64(0xFFFF)]
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
        shift = math.log(stored) if stored > 0 else 0.0
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
    common = np.uint32(0) - np.uint32(length)
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
                shift = np.float32(math.log(mass) - MASS_BITS * LOG_2)
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


@compiled
def tokens_after(ids, places, outsiders, bases, lookup, length, num_ranks, tokens):
    """Fill tokens [R]: each the id at its place, or, where the place is k, the rank next in
    `outsiders`, looked up as in `merge_ids`."""
    k = ids.shape[1]
    used = 0
    for t in range(ids.shape[0]):
        if places[t] < k:
            tokens[t] = ids[t, places[t]]
        elif used < outsiders.size and outsiders[used] < num_ranks:
            rank = np.int64(outsiders[used])
            used += 1
            tokens[t] = lookup[bases[t] + rank if rank < length else rank - length]
        else:
            return BAD_RANK, t
        if tokens[t] < 0:
            return BAD_RANK, t
    return 0, -1


@compiled
def places_of(ids, tokens, places):
    """Fill places [R]: where each token stands in its row of ids; k where it does not."""
    for t in range(ids.shape[0]):
        place = 0
        while place < ids.shape[1] and ids[t, place] != tokens[t]:
            place += 1
        places[t] = place


@compiled
def groups(levels, counts, places, start, sizes):
    """Fill start and sizes [R]: the first place of the group that a place belongs to, and how many
    entries the group has; k and 0 for the place k. Levels rise along a row."""
    k = levels.shape[1]
    for t in range(places.size):
        place = min(places[t], k)
        first = last = place
        while place < k and first > 0 and levels[t, first - 1] == levels[t, place]:
            first -= 1
        while last < counts[t] and levels[t, last] == levels[t, place]:
            last += 1
        start[t], sizes[t] = first, last - first


@compiled
def entries_at(logprobs, counts, places, found):
    """Fill found [R] (float64): the entry at each place, or the row's last for the place k; 0 where
    there is none or it is not finite."""
    k = logprobs.shape[1]
    for t in range(places.size):
        place = places[t] if places[t] < k else counts[t] - 1
        found[t] = logprobs[t, place] if place >= 0 else 0.0
        if not math.isfinite(found[t]):
            found[t] = 0.0
