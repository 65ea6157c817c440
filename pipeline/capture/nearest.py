"""The nearest items to some vectors, by L2 distance.

One idea: usearch finds a few more than are asked for, and their distances are computed again here
in fp64, item by item; so what is returned does not depend on what else was in the batch, and equal
distances go to the item that stands earlier in the catalogue.
"""

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
        self._graph = None if exact else _graph(self.vectors)

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
        gone = np.array([], dtype=np.int64) if without is None else without
        wanted = min(count + len(gone) + MARGIN, len(self))
        places = np.setdiff1d(self._find(query, wanted), gone)
        difference = self.vectors[places].astype(np.float64) - query.astype(np.float64)
        distances = np.sqrt(np.square(difference).sum(axis=1))
        order = np.lexsort((places, distances))[:count]
        return places[order].astype(np.int32), distances[order]

    def _find(self, query: np.ndarray, wanted: int) -> np.ndarray:
        search, metric = _usearch("search"), _usearch("MetricKind").L2sq
        row = np.ascontiguousarray(query, dtype=np.float32)
        if self._graph is not None:
            return np.asarray(self._graph.search(row, wanted).keys, dtype=np.int64)
        if wanted == len(self):
            return np.arange(wanted)
        found = search(self.vectors, row, wanted, metric, exact=True, threads=1)
        return np.asarray(found.keys, dtype=np.int64)


def _graph(vectors: np.ndarray) -> Any:
    """One thread, so that the same vectors give the same graph."""
    index = _usearch("Index")(
        ndim=vectors.shape[1], metric=_usearch("MetricKind").L2sq, dtype="f32"
    )
    index.add(np.arange(len(vectors)), vectors, threads=1)
    return index


def _usearch(name: str) -> Any:
    return getattr(extra_package("usearch.index", "recsys", "[candidates]"), name)
