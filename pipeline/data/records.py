"""The records of several caches about the same examples, and batches of them.

One idea: an example is its number in the main cache; what other caches and the images say of it is
looked up by its id when it is read. Which examples make a batch is decided elsewhere.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from stillroom.cache_schemas.errors import StudentError
from stillroom.pipeline.data.batch import DistillBatch, collate
from stillroom.pipeline.data.images import Pictures
from stillroom.pipeline.record import TeacherRecord

Answers = dict[str, TeacherRecord]
"""Cache name -> its record of one example; "" is the main cache."""


class RecordSource(Protocol):
    """What is asked of a cache (see `stillroom.pipeline.cache.reader.TeacherCache`)."""

    def __len__(self) -> int: ...

    def read(self, i: int, signals: Collection[str] | None = None) -> TeacherRecord: ...

    def shard_of(self, i: int) -> int: ...

    def index(self, columns: list[str] | None = None) -> Any:
        """Arrow table with columns `example_id` and `num_tokens`, one row per example."""
        ...


class Records:
    """Examples of a main cache with what further caches say of them.

    Args:
        sources: cache name -> cache; "" is the main one, whose numbers count.
        signals: cache name -> signals to read.
        pictures: looks up pixels and targets of the examples' images; None leaves them out.

    Raises:
        StudentError: a cache lacks an example of the main one.
    """

    def __init__(
        self,
        sources: Mapping[str, RecordSource],
        signals: Mapping[str, Collection[str]],
        pictures: Pictures | None = None,
    ):
        self.main = sources[""]
        self._sources, self._signals, self._pictures = dict(sources), dict(signals), pictures
        self._others = {
            name: matched(self.main, cache, name) for name, cache in sources.items() if name
        }

    def __len__(self) -> int:
        return len(self.main)

    def read(self, number: int) -> Answers:
        """What every cache says of one example."""
        found = {"": self.main.read(number, self._signals[""])}
        for name, numbers in self._others.items():
            found[name] = self._sources[name].read(int(numbers[number]), self._signals[name])
        return found

    def batch(
        self, rows: Sequence[Sequence[Answers]], capacity: int, padding_free: bool = False
    ) -> DistillBatch:
        """Records laid out as packed rows (see `stillroom.pipeline.data.batch.collate`)."""
        batch = collate(rows, capacity, padding_free)
        if self._pictures is None or batch.images is None:
            return batch
        return replace(batch, images=self._pictures.fill(batch.images))


def lengths_of(cache: RecordSource) -> np.ndarray:
    """int64 [examples]: tokens of each example."""
    return np.asarray(cache.index(["num_tokens"]).column("num_tokens"), dtype=np.int64)


def matched(main: RecordSource, other: RecordSource, name: str) -> np.ndarray:
    """int64 [examples]: for each example of the main cache, its number in another cache.

    Raises:
        StudentError: the other one lacks an example.
    """
    where = {example_id: number for number, example_id in enumerate(_ids(other))}
    wanted = _ids(main)
    missing = [example_id for example_id in wanted if example_id not in where]
    if missing:
        raise StudentError(
            f"cache '{name}' lacks {len(missing)} of {len(wanted)} examples, first {missing[0]}",
            where="[train.caches]",
            remedy="Capture it from the same prepared corpus.",
        )
    return np.array([where[example_id] for example_id in wanted])


def _ids(cache: RecordSource) -> list[str]:
    return cache.index(["example_id"]).column("example_id").to_pylist()
