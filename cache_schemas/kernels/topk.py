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


COARSE = 32
"""Steps per nat of the table from which the search for a level starts."""


@compiled
def coarse_levels(edges):
    """int64: the level of a = i / COARSE, for all i within the codebook."""
    found = np.empty(int(edges[-1] * COARSE) + 1, dtype=np.int64)
    level = 0
    for i in range(found.size):
        while level < edges.size - 2 and i / COARSE >= edges[level + 1]:
            level += 1
        found[i] = level
    return found


@compiled
def quantise(ids, logprobs, edges, coarse, vocab_size, counts, levels):
    """Fill counts [R] (entries before the padding) and levels [R, k] (uint16)."""
    num_rows, k = ids.shape
    last = edges.size - 2
    for t in range(num_rows):
        n = 0
        while n < k and ids[t, n] >= 0:
            n += 1
        counts[t] = n
        for r in range(n, k):
            if ids[t, r] != -1 or logprobs[t, r] != -np.inf:
                return BAD_PADDING, t
            levels[t, r] = 0
        for r in range(n):
            if ids[t, r] >= vocab_size:
                return BAD_ID, t
            a = -np.float64(logprobs[t, r])
            if not a >= -SLACK:
                return BAD_LOGPROB, t
            if r > 0 and logprobs[t, r] > logprobs[t, r - 1]:
                return UNSORTED, t
            if a == np.inf:
                levels[t, r] = last + 1
                continue
            level = coarse[min(int(max(a, 0.0) * COARSE), coarse.size - 1)]
            while level < last and a >= edges[level + 1]:
                level += 1
            levels[t, r] = level
    return 0, -1


@compiled
def quantise_each(logprobs, edges, levels):
    """Levels [R] of unrelated log-probabilities."""
    last = edges.size - 2
    for t in range(logprobs.size):
        a = -np.float64(logprobs[t])
        if not a >= -SLACK:
            return BAD_LOGPROB, t
        if a == np.inf:
            levels[t] = last + 1
        else:
            found = np.searchsorted(edges, a, side="right") - 1
            levels[t] = min(max(found, 0), last)
    return 0, -1


@compiled
def rank_steps(ids, levels, counts, classes, ranks, steps, sorted_ids):
    """Fill the rank steps [sum(counts)] and the order of ids [R, k]; `ranks` is [classes, vocab].

    Ids of one level are put in the order of their ranks; a step is the difference to the rank
    before it in the same level.
    """
    num_rows, k = ids.shape
    key = np.empty(k, dtype=np.int64)
    at = 0
    for t in range(num_rows):
        n = counts[t]
        rank_of = ranks[classes[t]]
        for r in range(n):  # by itself, so that the machine waits for all these look-ups at once
            key[r] = (np.int64(rank_of[ids[t, r]]) << 32) | ids[t, r]
        start = 0
        for r in range(1, n):
            if levels[t, r] != levels[t, r - 1]:
                start = r
            new = key[r]
            place = r
            while place > start and key[place - 1] > new:
                key[place] = key[place - 1]
                place -= 1
            key[place] = new
        before = np.int64(0)
        for r in range(n):
            rank = key[r] >> 32
            if r > 0 and levels[t, r] != levels[t, r - 1]:
                before = 0
            steps[at] = rank - before
            at += 1
            before = rank
            sorted_ids[t, r] = key[r] & 0xFFFFFFFF
        for r in range(n, k):
            sorted_ids[t, r] = -1


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
                    bit = np.uint64(j)
                    while gap > 0:
                        quad |= (gap & np.uint64(1)) << bit
                        gap >>= np.uint64(1)
                        bit += np.uint64(4)
                quads[stream, ends[2 + stream]] = quad
                ends[2 + stream] += 1


@compiled
def divergence(
    logprobs, tail, levels, tail_levels, counts, table, normalise, kl, worst
):  # fmt: skip
    """KL(given || decoded) [R] over the entries and the tail, in nats, and max |delta log p| [R]
    over entries above the codebook's floor.

    The given row is normalised too, so that rounding by the teacher is not counted.
    """
    floor = table[table.size - 2]
    mass_of = np.exp(table.astype(np.float64))
    for t in range(logprobs.shape[0]):
        mass, stored, cross, largest = 0.0, 0.0, 0.0, 0.0
        for r in range(counts[t] + 1):
            a = np.float64(logprobs[t, r]) if r < counts[t] else np.float64(tail[t])
            level = levels[t, r] if r < counts[t] else tail_levels[t]
            b = np.float64(table[level])
            if a == -np.inf:
                continue
            p = math.exp(a)
            mass += p
            stored += mass_of[level]
            cross += p * (a - b)
            if a > floor:
                largest = max(largest, abs(a - b))
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
def merge_logprobs(levels, tail_levels, counts, table, masses, normalise, logprobs, tail):
    """Fill logprobs [R, k] and tail [R] (empty: none) from levels known to be in the table.

    `masses` are the probabilities of `table` in units of 2**-MASS_BITS: integers, so that their
    sum does not depend on the order in which a machine adds.
    """
    k = np.uint64(logprobs.shape[1])
    with_tail = tail.size > 0
    for t in range(np.uint64(logprobs.shape[0])):
        n = np.uint64(counts[t])
        mass = np.int64(0)
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
                tail[t] -= shift
                for r in range(n):
                    logprobs[t, r] -= shift
        for r in range(n, k):
            logprobs[t, r] = -np.inf


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
