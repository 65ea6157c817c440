"""Loops over places: where the text's own token stands in its row's list, and what stands there.

One idea: a place is 0 to k - 1, or k for a token that is not in the list. It decodes no list: see
`topk_decoding`.
"""

import math

import numpy as np

from stillroom.cache_schemas.kernels import compiled
from stillroom.cache_schemas.kernels.topk import BAD_RANK


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
