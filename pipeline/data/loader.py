"""Batches for one rank, decoded ahead of training.

One idea: the plan of rows says what every step of every rank holds, so the loader only fetches.
The state of a loader is a `Position`; nothing about ranks or workers is in it.
"""

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from stillroom.cache_schemas.errors import ConfigError, StudentError
from stillroom.pipeline.data.batch import DistillBatch, collate
from stillroom.pipeline.data.images import Pictures
from stillroom.pipeline.data.packing import Position, RowPlan
from stillroom.pipeline.record import TeacherRecord

STEPS_AHEAD = 2


class RecordSource(Protocol):
    """What the loader asks of a cache (see `stillroom.pipeline.cache.reader.TeacherCache`)."""

    def __len__(self) -> int: ...

    def read(self, i: int, signals: Collection[str] | None = None) -> TeacherRecord: ...

    def shard_of(self, i: int) -> int: ...

    def index(self, columns: list[str] | None = None) -> Any:
        """Arrow table with columns `example_id` and `num_tokens`, one row per example."""
        ...


@dataclass(frozen=True, slots=True)
class Geometry:
    """How much text a step holds, and this rank's share of it.

    Attributes:
        capacity: tokens of a packed row.
        rows: packed rows of a microbatch.
        accumulate: microbatches of a step over all ranks.
        rank: this process.
        world_size: processes.
        padding_free: see `stillroom.pipeline.data.batch.collate`.
    """

    capacity: int
    rows: int
    accumulate: int = 1
    rank: int = 0
    world_size: int = 1
    padding_free: bool = False

    def __post_init__(self):
        if self.accumulate % self.world_size:
            raise ConfigError(
                f"accumulate = {self.accumulate} over {self.world_size} ranks",
                expected="a multiple of the number of ranks",
                where="[train]",
                remedy="It counts the microbatches of a step over all ranks together.",
            )

    def own(self, rows: list) -> list[list]:
        """This rank's microbatches out of a whole step's rows."""
        share = self.accumulate // self.world_size  # microbatches
        start = self.rank * share * self.rows  # of the step's rows
        return [rows[start + m * self.rows : start + (m + 1) * self.rows] for m in range(share)]


class DistillLoader:
    """Steps of training, from any position.

    Args:
        sources: cache name -> cache; "" is the main one, whose examples set the order.
        signals: cache name -> signals to read.
        geometry: size of a step and this rank's share.
        seed: of the order.
        shuffle_shards: shards shuffled together.
        workers: threads that decode ahead (decoding leaves Python's lock); 0 decodes when asked.
        pin_memory: page-lock batches for a faster copy to a GPU.
        pictures: looks up pixels and targets of the examples' images; None leaves them out.
    """

    def __init__(
        self,
        sources: Mapping[str, RecordSource],
        signals: Mapping[str, Collection[str]],
        geometry: Geometry,
        seed: int = 0,
        shuffle_shards: int = 16,
        workers: int = 0,
        pin_memory: bool = False,
        pictures: Pictures | None = None,
    ):
        main = sources[""]
        shards = np.fromiter((main.shard_of(i) for i in range(len(main))), dtype=np.int64)
        self.plan = RowPlan(lengths_of(main), shards, geometry.capacity, seed, shuffle_shards)
        self._sources, self._signals = dict(sources), dict(signals)
        # int64 [examples] each: where the main cache's examples are in the others.
        self._others = {name: _match(main, cache, name) for name, cache in sources.items() if name}
        self.geometry, self._workers, self._pin_memory = geometry, workers, pin_memory
        self._pictures = pictures

    def steps(
        self, position: Position, count: int
    ) -> Iterator[tuple[list[DistillBatch], Position]]:
        """`count` steps from `position`: this rank's microbatches and the position after each."""
        if not self._workers:
            for rows, end in self._tasks(position, count):
                yield [self._batch(part) for part in rows], end
            return
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="decode")
        try:
            yield from self._ahead(pool, self._tasks(position, count))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _ahead(self, pool: ThreadPoolExecutor, tasks) -> Iterator:
        """Keep the next `STEPS_AHEAD` steps being decoded."""
        pending: deque = deque()
        for rows, end in tasks:
            pending.append(([pool.submit(self._batch, part) for part in rows], end))
            if len(pending) > STEPS_AHEAD:
                yield _results(pending.popleft())
        while pending:
            yield _results(pending.popleft())

    def _tasks(self, position: Position, count: int) -> Iterator[tuple[list[list], Position]]:
        """For each step: rows of each of this rank's microbatches, and the position after it."""
        for _ in range(count):
            rows, position = self.plan.take(position, self.geometry.accumulate * self.geometry.rows)
            yield self.geometry.own(rows), position

    def _batch(self, rows: list[tuple[int, ...]]) -> DistillBatch:
        records = [[self._read(number) for number in row] for row in rows]
        batch = collate(records, self.geometry.capacity, self.geometry.padding_free)
        if self._pictures is not None and batch.images is not None:
            batch = replace(batch, images=self._pictures.fill(batch.images))
        return batch.pin_memory() if self._pin_memory else batch

    def _read(self, number: int) -> dict[str, TeacherRecord]:
        found = {"": self._sources[""].read(number, self._signals[""])}
        for name, numbers in self._others.items():
            found[name] = self._sources[name].read(int(numbers[number]), self._signals[name])
        return found


def _results(step: tuple[list[Future], Position]) -> tuple[list[DistillBatch], Position]:
    futures, end = step
    return [future.result() for future in futures], end


def lengths_of(cache: RecordSource) -> np.ndarray:
    """int64 [examples]: tokens of each example."""
    return np.asarray(cache.index(["num_tokens"]).column("num_tokens"), dtype=np.int64)


def _match(main: RecordSource, other: RecordSource, name: str) -> np.ndarray:
    """For each example of the main cache, its number in another cache."""
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
