"""The nearest items to some vectors, by L2 distance.

One idea: usearch finds a few more than are asked for, and their distances are computed again here
in fp64, item by item; so what is returned does not depend on what else was in the batch, and equal
distances go to the item that stands earlier in the catalogue. Items of one vector (films of one
title) are searched as one, however many they are.
"""

import hashlib
from typing import Any

import numpy as np

from stillroom.cache_schemas.extras import extra_package

MARGIN = 16
"""Found beyond what is asked for: rounding inside the search may swap neighbours."""


class Nearest:
    """Vectors that can be searched.

    Args:
        vectors: float32 [N, D].
        exact: compare with every vector; False builds a graph (HNSW) and may miss neighbours.
    """

    def __init__(self, vectors: np.ndarray, exact: bool = True):
        self.vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        group, first = _alike(self.vectors)
        # Most catalogues have no two items of one vector, and then nothing is copied.
        self._each = self.vectors if len(first) == len(group) else self.vectors[first]
        self._members = np.argsort(group, kind="stable")
        self._ends = np.cumsum(np.bincount(group, minlength=len(first)))
        self._graph = None if exact else _graph(self._each)

    def __len__(self) -> int:
        return len(self.vectors)

    def search(
        self, query: np.ndarray, count: int, without: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The nearest to one vector.

        Args:
            query: float32 [D].
            count: how many, at most.
            without: places that are left out.

        Returns:
            int32 [n] places and float64 [n] distances, nearest first; n < count where the
            catalogue has no more.
        """
        gone = np.array([], dtype=np.int64) if without is None else np.unique(without)
        room = count + len(gone)
        groups = self._find(query, min(room + MARGIN, len(self._each)))
        difference = self._each[groups].astype(np.float64) - query.astype(np.float64)
        far = np.sqrt(np.square(difference).sum(axis=1))
        parts = [self._of(group)[:room] for group in groups.tolist()]
        places = np.concatenate(parts)
        distances = np.repeat(far, [len(part) for part in parts])
        order = np.lexsort((places, distances))
        order = order[~np.isin(places[order], gone)][:count]
        return places[order].astype(np.int32), distances[order]

    def _of(self, group: int) -> np.ndarray:
        """Places of the items of one vector, rising."""
        start = self._ends[group - 1] if group else 0
        return self._members[start : self._ends[group]]

    def _find(self, query: np.ndarray, wanted: int) -> np.ndarray:
        search, metric = _usearch("search"), _usearch("MetricKind").L2sq
        row = np.ascontiguousarray(query, dtype=np.float32)
        if self._graph is not None:
            return np.asarray(self._graph.search(row, wanted).keys, dtype=np.int64)
        if wanted == len(self._each):
            return np.arange(wanted)
        found = search(self._each, row, wanted, metric, exact=True, threads=1)
        return np.asarray(found.keys, dtype=np.int64)


def _alike(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64 [N] group of every vector, equal ones in one, and int64 [groups] the first of each."""
    seen: dict[bytes, int] = {}
    first: list[int] = []
    group = np.empty(len(vectors), dtype=np.int64)
    for place, row in enumerate(vectors):
        # Adding 0 makes one zero of two.
        key = hashlib.blake2b(np.add(row, np.float32(0)), digest_size=16).digest()
        group[place] = seen.setdefault(key, len(first))
        if group[place] == len(first):
            first.append(place)
    return group, np.array(first, dtype=np.int64)


def _graph(vectors: np.ndarray) -> Any:
    """One thread, so that the same vectors give the same graph."""
    index = _usearch("Index")(
        ndim=vectors.shape[1], metric=_usearch("MetricKind").L2sq, dtype="f32"
    )
    index.add(np.arange(len(vectors)), vectors, threads=1)
    return index


def _usearch(name: str) -> Any:
    return getattr(extra_package("usearch.index", "recsys", "[candidates]"), name)
