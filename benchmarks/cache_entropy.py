"""How few bytes a model of ids by their frequency alone would need: the limit to compare with.

One idea: the adaptive code length, in bits, of the same rows that the codecs code, under the models
of the classical layouts: ids by frequency (without those already in the row), gaps between the
small profile's levels by place, and less what the order inside equal levels is worth. A codec that
knows more than frequencies can be below it.
"""

import math

import numba
import numpy as np

TAIL_BITS = 6.6
"""Adaptive cost of the tail's level; hardly varies."""


@numba.njit
def _id_bits(ids, vocab_size, first_measured):
    """Mean bits of an id; counts adapt from row to row and exclude a row's own earlier ids."""
    counts = np.full(vocab_size, 0.05)
    total, bits, measured = counts.sum(), 0.0, 0
    for t in range(ids.shape[0]):
        seen = 0.0
        for r in range(ids.shape[1]):
            if t >= first_measured:
                bits -= math.log2(counts[ids[t, r]] / (total - seen))
                measured += 1
            seen += counts[ids[t, r]]
        for r in range(ids.shape[1]):
            counts[ids[t, r]] += 1
        total += ids.shape[1]
    return bits / measured


@numba.njit
def _gap_bits(levels, first_measured):
    """(mean bits of a gap, bits per id that the order inside equal levels would have cost)."""
    places, symbols = 10, 1024
    counts = np.full((places, 8, symbols), 0.02)
    totals = np.full((places, 8), 0.02 * symbols)
    bits, saved, measured = 0.0, 0.0, 0
    for t in range(levels.shape[0]):
        before, last, group = 0, 0, 1
        for r in range(levels.shape[1]):
            gap = min(levels[t, r] - before, symbols - 1)
            place = r if r < 4 else min(2 + int(math.log2(r)), places - 1)
            context = 0 if last == 0 else min(1 + int(math.log2(last)), 7)
            if t >= first_measured:
                bits -= math.log2(counts[place, context, gap] / totals[place, context])
                group = group + 1 if r > 0 and gap == 0 else 1
                saved += math.log2(group)
                measured += 1
            counts[place, context, gap] += 1
            totals[place, context] += 1
            before, last = levels[t, r], gap
    return bits / measured, saved / measured


def unigram_limit_bytes(
    ids: np.ndarray, levels: np.ndarray, vocab_size: int, first_measured: int
) -> float:
    """Bytes per row of lists and tail, measured from row `first_measured` on.

    Args:
        ids: int [R, k] by falling probability.
        levels: int [R, k] of a codebook.
        vocab_size: number of ids.
        first_measured: rows before it only train the models.
    """
    id_bits = _id_bits(ids.astype(np.int64), vocab_size, first_measured)
    gap_bits, saved = _gap_bits(levels.astype(np.int64), first_measured)
    return ((id_bits + gap_bits - saved) * ids.shape[1] + TAIL_BITS) / 8
