"""Top-k lists and their tail, as streams of a record: levels, ranks and classes.

One idea: what is coded is a `Codebook` level per log-probability and a `Rankings` rank per id; all
else in a record is predicted from the decoded lists. The KL divergence of every row is measured
while it is written; a record with a row above the bound is written again with finer levels.
"""

import functools
from itertools import pairwise
from typing import Any

import numpy as np

from stillroom.cache_schemas.codebook import Codebook
from stillroom.cache_schemas.errors import CacheError
from stillroom.cache_schemas.joined import Joined
from stillroom.cache_schemas.lists import LevelTable, Lists, RowError, explain, refuse
from stillroom.cache_schemas.rankings import Rankings
from stillroom.cache_schemas.streams import Record, Streams, corrupt

PARAMETERS, COUNTS, CLASSES, TAIL, FIRST_GAP, NEXT_GAPS, QUADS, STEPS = (
    16,
    17,
    18,
    19,
    20,
    21,
    22,
    25,
)
NUM_QUADS = 3
MAX_FINER = 6
SUM_SLACK = 2e-3
"""Rows whose mass is within this of one are scaled to sum to one when they are decoded."""


class TopkCoder:
    """Codes topk_ids, topk_logprobs and, where there is one, tail_logprob.

    Args:
        codebook: levels.
        rankings: classes and ranks.
        max_kl: no row may lose more (inf: not bounded).
        normalise: whether rows that sum to one are decoded to sum to one.
    """

    def __init__(
        self, codebook: Codebook, rankings: Rankings, max_kl: float, normalise: bool = True
    ):
        self.codebook, self.rankings = codebook, rankings
        self.max_kl, self.normalise = max_kl, normalise
        self._levels_of: dict[int, LevelTable] = {}

    def encode(
        self, ids: np.ndarray, logprobs: np.ndarray, given: np.ndarray | None, classes: np.ndarray
    ) -> tuple[Streams, Lists, RowError]:
        """Streams of the rows, the lists they decode to, and the error.

        Args:
            ids, logprobs: [R, k].
            given: [R] tail_logprob, if there is one: a record of no rows holds it all the same.
            classes: [R] of the rankings.

        Raises:
            CacheError: a value that is no id or no log-probability; names signal and row.
        """
        ids, logprobs = _sorted(ids, logprobs)
        tail = np.empty(0, dtype=np.float32) if given is None else given
        masses = np.exp(logprobs, dtype=np.float64)
        scale = self.normalise and _sums_to_one(masses, tail)
        for finer in range(MAX_FINER + 1):
            levels, tail_levels, counts = self._levels(ids, logprobs, tail, finer)
            values = logprobs, tail, masses
            error = self._error(*values, levels, tail_levels, counts, finer, scale)
            if error.kl_max <= self.max_kl:
                break
        else:
            raise CacheError(
                f"KL divergence of a row {error.kl_max:.3g}",
                expected=f"at most {self.max_kl:.3g}",
                where="topk_logprobs",
                remedy="Use profile 'strict' or 'exact'.",
            )
        streams = self._streams(ids, levels, counts, classes)
        streams[PARAMETERS] = np.array([finer, scale], dtype=np.uint8)
        if given is not None:
            streams[TAIL] = tail_levels
        order = streams.pop(-1)  # no stream: the ids as they are stored
        return (
            streams,
            self._lists(order, levels, tail_levels, counts, classes, finer, scale),
            error,
        )

    def decode(self, record: Record | Joined, k: int) -> Lists:
        """The lists of a record.

        Raises:
            ShardCorrupt: the streams contradict each other or the tables.
        """
        from stillroom.cache_schemas.kernels.topk_decoding import merge_ids

        finer, scale = (int(value) for value in record.stream(PARAMETERS, "u1", once=2)[:2])
        if finer > MAX_FINER or scale > 1:
            corrupt(f"parameters {finer}, {scale}")
        counts = self._counts(record, k)
        classes = record.stream(CLASSES, "u1", rows=1)
        if classes.size and classes.max() >= len(self.rankings.lists):
            corrupt(f"class {classes.max()}", f"below {len(self.rankings.lists)}")
        levels = self._merged_levels(record, counts, k, finer)
        ids = np.empty(levels.shape, dtype=np.int32)
        steps = record.stream(STEPS, "u2", "u4", rows=counts)
        rankings = self.rankings
        bases = rankings.base(classes)
        length = rankings.lists.shape[1]
        refuse(
            merge_ids(
                steps, levels, counts, bases, rankings.lookup, length, rankings.num_ranks, ids
            )
        )
        tail_levels = self._tail_levels(record, finer)
        return self._lists(ids, levels, tail_levels, counts, classes, finer, bool(scale))

    def _levels(
        self, ids: np.ndarray, logprobs: np.ndarray, tail: np.ndarray, finer: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(levels [R, k], levels of the tail, entries before the padding)."""
        from stillroom.cache_schemas.kernels.topk import quantise, quantise_each

        search = self._table(finer).search
        counts = np.empty(len(ids), dtype=np.int32)  # [R]
        levels = np.empty(ids.shape, dtype=np.uint16)
        tail_levels = np.empty(len(tail), dtype=np.uint16)
        vocab_size = self.rankings.common.size
        explain(
            "topk",
            ids,
            logprobs,
            *quantise(ids, logprobs, *search, vocab_size, counts, levels),
        )
        explain("tail_logprob", ids, tail[:, None], *quantise_each(tail, *search, tail_levels))
        return levels, tail_levels, counts

    def _error(self, logprobs, tail, masses, levels, tail_levels, counts, finer, scale) -> RowError:
        from stillroom.cache_schemas.kernels.topk import divergence

        table = self._table(finer).logprobs
        kl, worst = np.empty(len(counts)), np.empty(len(counts))  # [R], nats
        if not tail.size:
            tail = np.full(len(counts), -np.inf, dtype=np.float32)
            tail_levels = np.zeros(len(counts), dtype=np.uint16)
        divergence(logprobs, tail, masses, levels, tail_levels, counts, table, scale, kl, worst)
        kl_max, delta_max = float(kl.max(initial=0)), float(worst.max(initial=0))
        return RowError(float(kl.sum()), kl_max, delta_max, len(kl))

    def _streams(self, ids, levels, counts, classes) -> Streams:
        from stillroom.cache_schemas.kernels.topk import level_gaps, rank_steps, sort_keys

        rows, k = ids.shape
        streams: Streams = {CLASSES: classes}
        if not (counts == k).all():
            streams[COUNTS] = counts.astype(np.uint16)
        ends = np.zeros(2 + NUM_QUADS, dtype=np.int64)
        single = np.empty((2, 3 * rows), dtype=np.uint16)
        quads = np.empty((NUM_QUADS, rows * -(-k // 4)), dtype=np.uint64)
        level_gaps(levels, counts, single, quads, ends)
        streams[FIRST_GAP], streams[NEXT_GAPS] = (single[i, : ends[i]] for i in range(2))
        narrow = np.uint32 if not quads.size or _largest(quads, ends) < 1 << 32 else np.uint64
        for i in range(NUM_QUADS):
            streams[QUADS + i] = quads[i, : ends[2 + i]].astype(narrow)
        steps = np.empty(int(counts.sum(dtype=np.int64)), dtype=self.rankings.dtype)
        order = np.empty((rows, k), dtype=np.int32)
        keys = np.empty((rows, k), dtype=np.uint64)  # see `sort_keys`
        sort_keys(ids, levels, counts, classes, self.rankings.ranks, keys)
        keys.sort(axis=1)
        rank_steps(keys, ids, counts, steps, order)
        return streams | {STEPS: steps, -1: order}

    def _lists(self, ids, levels, tail_levels, counts, classes, finer, scale) -> Lists:
        from stillroom.cache_schemas.kernels.topk_decoding import merge_logprobs

        table = self._table(finer)
        logprobs = np.empty(ids.shape, dtype=np.float32)
        tail = np.empty(len(tail_levels), dtype=np.float32)
        shifts = np.empty(len(ids), dtype=np.float32)
        values = table.logprobs, table.masses
        merge_logprobs(levels, tail_levels, counts, *values, scale, logprobs, tail, shifts)
        return Lists(ids, logprobs, tail, levels, counts, classes, shifts, table)

    def _counts(self, record: Record | Joined, k: int) -> np.ndarray:
        if COUNTS not in record.entries:
            return np.full(record.rows, k, dtype=np.int32)
        counts = record.stream(COUNTS, "u2", rows=1).astype(np.int32)
        if counts.max(initial=0) > k:
            corrupt(f"a list of {counts.max()} entries", f"at most {k}")
        return counts

    def _merged_levels(
        self, record: Record | Joined, counts: np.ndarray, k: int, finer: int
    ) -> np.ndarray:
        from stillroom.cache_schemas.kernels.topk_decoding import merge_levels

        sizes = _stream_sizes(counts, k, full=COUNTS not in record.entries)
        first = record.stream(FIRST_GAP, "u2", rows=sizes[0])
        if first.size != record.rows:
            first = _spread(first, counts > 0)
        following = record.stream(NEXT_GAPS, "u2", rows=sizes[1])
        quads = [record.stream(QUADS + i, "u4", "u8", rows=sizes[2 + i]) for i in range(NUM_QUADS)]
        at = np.cumsum([0, *(len(quad) for quad in quads[:-1])], dtype=np.int64)
        levels = np.empty((record.rows, k), dtype=np.uint32)
        last = len(self._table(finer).logprobs) - 1  # that of p = 0
        joined = np.concatenate(quads)
        parts = first, following, joined, at
        refuse(merge_levels(*parts, counts, np.uint64(last), _running_sums(), levels))
        return levels

    def _tail_levels(self, record: Record | Joined, finer: int) -> np.ndarray:
        if TAIL not in record.entries:
            return np.empty(0, dtype=np.uint16)
        levels = record.stream(TAIL, "u2", rows=1)
        if levels.max(initial=0) >= len(self._table(finer).logprobs):
            corrupt(f"tail level {levels.max()}")
        return levels

    def _table(self, finer: int) -> LevelTable:
        if finer not in self._levels_of:
            self._levels_of[finer] = LevelTable.of(self.codebook.finer(finer))
        return self._levels_of[finer]


def _sorted(ids: np.ndarray, logprobs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows by falling log-probability: what they nearly always are already."""
    if not (logprobs[:, 1:] > logprobs[:, :-1]).any():
        return np.ascontiguousarray(ids), np.ascontiguousarray(logprobs)
    order = np.argsort(np.where(ids < 0, np.inf, -logprobs), axis=1, kind="stable")
    return np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1)


def _sums_to_one(masses: np.ndarray, tail: np.ndarray) -> bool:
    if not tail.size:
        return False
    mass = masses.sum(axis=1) + np.exp(tail, dtype=np.float64)
    return bool((np.abs(mass - 1) <= SUM_SLACK).all())


def _largest(quads: np.ndarray, ends: np.ndarray) -> int:
    return max(int(quads[i, : ends[2 + i]].max(initial=0)) for i in range(NUM_QUADS))


@functools.cache
def _running_sums() -> np.ndarray:
    from stillroom.cache_schemas.kernels.topk_decoding import running_sums

    return running_sums()


def _spread(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    full = np.zeros(len(where), dtype=values.dtype)
    full[where] = values
    return full


def _stream_sizes(counts: np.ndarray, k: int, full: bool) -> list[Any]:
    """Elements of every row, or of each, in the gap streams: first, next, and the quads."""
    from stillroom.cache_schemas.kernels.topk import QUAD_STARTS, SINGLE_GAPS

    if full:
        return _row_sizes(k)
    counts = counts.astype(np.int64)
    sizes = [counts > 0, np.clip(counts - 1, 0, SINGLE_GAPS - 1)]
    for start, end in pairwise(QUAD_STARTS):
        sizes.append(-(-(np.clip(counts, start, end) - start) // 4))
    return sizes


@functools.cache
def _row_sizes(k: int) -> list[int]:
    """Elements that one row of `k` entries has in each gap stream."""
    return [int(size[0]) for size in _stream_sizes(np.array([k]), k, full=False)]
