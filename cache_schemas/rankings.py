"""Ranking classes: a few dozen orders of the vocabulary, of which every row names the best one.

One idea: a top-k list is predicted by the lists it resembles (digits, verbs, closing brackets), so
rows are clustered by the ids they hold, each cluster keeps its ids in order of frequency, and a row
stores one class number and small ranks instead of ids. That is a mixture of unigram models fitted
by hard expectation-maximisation. It needs no context, so any row decodes alone.
"""

from functools import cached_property

import numpy as np

from stillroom.cache_schemas.errors import ShardCorrupt

LIMIT = 256
"""Classes that a row's class number, a byte, can name."""
MAX_CLASSES = 128
"""Classes that `fit` makes; 256 would save one byte in eighty and halve the speed of encoding."""
MAX_LISTED = 4096
ROWS_PER_CLASS = 128
FIT_ROWS = 1 << 17
ROUNDS = 10
PRIOR = 1500.0
"""Pseudo-occurrences by which the whole corpus's frequencies smooth those of a class."""
RANK_OFFSET = 24
"""A rank r costs about log2(r + RANK_OFFSET) bits; decides between classes only."""


class Rankings:
    """Orders of the vocabulary.

    Args:
        lists: int [classes, length] ids of each class by falling frequency. A rank below `length`
            is looked up here.
        common: int [vocab] all ids by falling frequency; rank `length + i` is `common[i]`.
    """

    def __init__(self, lists: np.ndarray, common: np.ndarray):
        vocab_size = common.size
        if lists.ndim != 2 or not 0 < lists.shape[0] <= LIMIT or common.ndim != 1:
            raise ShardCorrupt(f"shape {lists.shape}", where="table 'lists'")
        for name, table in (("lists", lists), ("common", common)):
            if table.dtype.kind not in "iu" or not _all_ids(table, vocab_size):
                raise ShardCorrupt(f"ids outside 0 .. {vocab_size - 1}", where=f"table '{name}'")
        if np.unique(common).size != vocab_size:
            raise ShardCorrupt("an id is missing", where="table 'common'")
        self.lists = np.ascontiguousarray(lists, dtype=np.int32)
        self.common = np.ascontiguousarray(common, dtype=np.int32)

    def tables(self) -> dict[str, np.ndarray]:
        """The arguments, in the narrowest dtype that holds an id."""
        dtype = np.uint16 if self.common.size <= 1 << 16 else np.uint32
        return {"lists": self.lists.astype(dtype), "common": self.common.astype(dtype)}

    @property
    def num_ranks(self) -> int:
        """Ranks are below this."""
        length = self.lists.shape[1]
        return length if length >= self.common.size else length + self.common.size

    @property
    def dtype(self) -> type:
        """The narrowest dtype of a rank."""
        return np.uint16 if self.num_ranks <= 1 << 16 else np.uint32

    @cached_property
    def lookup(self) -> np.ndarray:
        """`common`, then the lists one after another, in the narrowest dtype that holds an id."""
        dtype = np.uint16 if self.common.size <= 1 << 16 else np.int32
        return np.concatenate([self.common, self.lists.reshape(-1)]).astype(dtype)

    @cached_property
    def places(self) -> np.ndarray:
        """uint32 [vocab]: the place of every id in `common`."""
        places = np.empty(self.common.size, dtype=np.uint32)
        places[self.common] = np.arange(self.common.size, dtype=np.uint32)
        return places

    def base(self, classes: np.ndarray) -> np.ndarray:
        """int64 [R]: where each row's list begins in `lookup`."""
        return self.common.size + classes.astype(np.int64) * self.lists.shape[1]

    @cached_property
    def ranks(self) -> np.ndarray:
        """`dtype` [classes, vocab]: the rank of every id in every class."""
        classes, length = self.lists.shape
        ranks = np.empty((classes, self.common.size), dtype=self.dtype)
        if length < self.num_ranks:
            ranks[:, self.common] = np.arange(length, self.num_ranks)
        # falling order, so that the first of a repeated id wins
        for rank in range(length - 1, -1, -1):
            ranks[np.arange(classes), self.lists[:, rank]] = rank
        return ranks

    @cached_property
    def cost(self) -> np.ndarray:
        """uint8 [vocab, classes]: eighths of a bit above the first rank."""
        bits = np.log2(np.arange(self.num_ranks) + RANK_OFFSET)
        return np.ascontiguousarray(_eighths(1.5 * (bits - bits[0]))[self.ranks].T)

    def choose(self, ids: np.ndarray) -> np.ndarray:
        """uint8 [R]: the class that codes the ids [R, n] (-1 pads) of each row most cheaply."""
        from stillroom.cache_schemas.kernels.classes import cheapest

        classes = np.zeros(len(ids), dtype=np.uint8)
        if len(self.lists) > 1:
            cheapest(ids, self.cost, classes)
        return classes

    @classmethod
    def fit(cls, ids: np.ndarray, vocab_size: int) -> "Rankings":
        """Rankings for lists like `ids` [R, k] (-1 pads); R = 0 gives the order of the ids."""
        ids = _thinned(ids)
        frequency = np.bincount(ids[ids >= 0], minlength=vocab_size).astype(np.float64)
        common = np.argsort(-frequency, kind="stable").astype(np.int32)
        # The largest power of two that leaves every class enough rows to be fitted on.
        num_classes = 1 << int(np.log2(np.clip(len(ids) // ROWS_PER_CLASS, 1, MAX_CLASSES)))
        length = min(vocab_size, MAX_LISTED)
        if num_classes == 1:
            return cls(common[None, :length], common)
        return cls(_listed(_cluster(ids, frequency, num_classes), frequency, length), common)


def _all_ids(table: np.ndarray, vocab_size: int) -> bool:
    return not table.size or bool(table.min() >= 0 and table.max() < vocab_size)


def _eighths(bits: np.ndarray) -> np.ndarray:
    """uint8 eighths of a bit."""
    return np.clip(np.rint(8 * bits), 0, 255).astype(np.uint8)


def _thinned(ids: np.ndarray) -> np.ndarray:
    """At most FIT_ROWS rows, evenly spread."""
    step = -(-max(len(ids), 1) // FIT_ROWS)
    return np.ascontiguousarray(ids[::step], dtype=np.int64)


def _cluster(ids: np.ndarray, frequency: np.ndarray, num_classes: int) -> np.ndarray:
    """float64 [vocab, classes]: how often each id occurred in the rows of each class."""
    from stillroom.cache_schemas.kernels.classes import cheapest, tally

    rng = np.random.default_rng(0)
    seeds = rng.choice(len(ids), num_classes, replace=False)
    counts = np.zeros((frequency.size, num_classes))
    tally(ids[seeds], np.arange(num_classes), counts)
    counts *= 50
    classes = np.empty(len(ids), dtype=np.int64)  # [R]
    for _ in range(ROUNDS):
        cheapest(ids, _eighths(-np.log2(_share(counts, frequency))), classes)
        counts[:] = 0
        tally(ids, classes, counts)
    return counts


def _share(counts: np.ndarray, frequency: np.ndarray) -> np.ndarray:
    """Probabilities [vocab, classes] of ids in classes."""
    overall = (frequency + 0.1) / (frequency + 0.1).sum()
    return (counts + PRIOR * overall[:, None]) / (counts.sum(axis=0) + PRIOR)


def _listed(counts: np.ndarray, frequency: np.ndarray, length: int) -> np.ndarray:
    """int32 [classes, length]: the likeliest ids of each class."""
    order = np.argsort(-_share(counts, frequency), axis=0, kind="stable")
    return np.ascontiguousarray(order[:length].T, dtype=np.int32)
