"""Batches for one rank, decoded ahead of training.

One idea: the plan of rows says what every step of every rank holds, so the loader only fetches.
The state of a loader is a `Position`; nothing about ranks or workers is in it.
"""

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cache_schemas.errors import ConfigError, StudentError
from pipeline.data.batch import DistillBatch, collate
from pipeline.data.packing import Position, RowPlan
from pipeline.record import TeacherRecord


class RecordSource(Protocol):
    """What the loader asks of a cache (see `pipeline.cache.reader.TeacherCache`)."""

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
        padding_free: see `pipeline.data.batch.collate`.
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
        share = self.accumulate // self.world_size
        start = self.rank * share * self.rows
        return [rows[start + m * self.rows : start + (m + 1) * self.rows] for m in range(share)]


class _Microbatches(Dataset):
    """Rows (tuples of example numbers) -> DistillBatch; runs in the workers."""

    def __init__(self, sources, signals, others: dict[str, np.ndarray], geometry: Geometry):
        self.sources, self.signals = sources, signals
        self.others, self.geometry = others, geometry

    def __getitem__(self, rows) -> DistillBatch:
        records = [[self._read(number) for number in row] for row in rows]
        return collate(records, self.geometry.capacity, self.geometry.padding_free)

    def _read(self, number: int) -> dict[str, TeacherRecord]:
        found = {"": self.sources[""].read(number, self.signals[""])}
        for name, numbers in self.others.items():
            found[name] = self.sources[name].read(int(numbers[number]), self.signals[name])
        return found


@dataclass(frozen=True, slots=True)
class _Tasks:
    """The sampler: rows of each of this rank's microbatches, planned when they are asked for.

    Attributes:
        ends: filled with the position after each planned step.
    """

    plan: RowPlan
    geometry: Geometry
    start: Position
    count: int
    ends: deque

    def __iter__(self) -> Iterator[list]:
        position = self.start
        for _ in range(self.count):
            rows, position = self.plan.take(position, self.geometry.accumulate * self.geometry.rows)
            self.ends.append(position)
            yield from self.geometry.own(rows)


class DistillLoader:
    """Steps of training, from any position.

    Args:
        sources: cache name -> cache; "" is the main one, whose examples set the order.
        signals: cache name -> signals to read.
        geometry: size of a step and this rank's share.
        seed: of the order.
        shuffle_shards: shards shuffled together.
        workers: processes that decode ahead; 0 decodes when asked.
        pin_memory: page-lock batches for a faster copy to a GPU.
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
    ):
        main = sources[""]
        self.plan = RowPlan(
            lengths_of(main),
            np.fromiter((main.shard_of(i) for i in range(len(main))), dtype=np.int64),
            geometry.capacity,
            seed,
            shuffle_shards,
        )
        others = {name: _match(main, cache, name) for name, cache in sources.items() if name}
        self._dataset = _Microbatches(dict(sources), dict(signals), others, geometry)
        self.geometry, self._workers, self._pin_memory = geometry, workers, pin_memory

    def steps(
        self, position: Position, count: int
    ) -> Iterator[tuple[list[DistillBatch], Position]]:
        """`count` steps from `position`: this rank's microbatches and the position after each."""
        ends: deque[Position] = deque()
        batches = iter(self._batches(_Tasks(self.plan, self.geometry, position, count, ends)))
        share = self.geometry.accumulate // self.geometry.world_size
        for _ in range(count):
            yield [next(batches) for _ in range(share)], ends.popleft()

    def _batches(self, tasks: "_Tasks") -> DataLoader:
        many = {"prefetch_factor": 4, "multiprocessing_context": "forkserver"}
        return DataLoader(
            self._dataset,
            batch_size=None,
            sampler=tasks,
            collate_fn=_as_it_is,
            num_workers=self._workers,
            pin_memory=self._pin_memory,
            worker_init_fn=_leave_signals_to_the_trainer,
            # An own generator: the default would draw from, and so disturb, the global one.
            generator=torch.Generator(),
            **(many if self._workers else {}),
        )


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


def _as_it_is(batch: DistillBatch) -> DistillBatch:
    return batch


def _leave_signals_to_the_trainer(_worker: int) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
