"""Batches for one rank, decoded ahead of training.

One idea: the plan of rows says what every step of every rank holds, so the loader only fetches.
The state of a loader is a `Position`; nothing about ranks or workers is in it.
"""

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from stillroom.cache_schemas.errors import ConfigError
from stillroom.pipeline.data.batch import DistillBatch
from stillroom.pipeline.data.images import Pictures
from stillroom.pipeline.data.packing import Position, RowPlan
from stillroom.pipeline.data.records import Records, RecordSource, lengths_of

STEPS_AHEAD = 2


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
        packed: several examples may share a row.
    """

    capacity: int
    rows: int
    accumulate: int = 1
    rank: int = 0
    world_size: int = 1
    padding_free: bool = False
    packed: bool = True

    def __post_init__(self):
        if self.accumulate % self.world_size:
            raise ConfigError(
                f"accumulate = {self.accumulate} over {self.world_size} ranks",
                expected="a multiple of the number of ranks",
                where="[train]",
                remedy="It counts the microbatches of a step over all ranks together.",
            )

    @property
    def width(self) -> int:
        """Tokens that lie in one row of a microbatch."""
        return self.capacity * (self.rows if self.padding_free else 1)

    def own(self, rows: list) -> list[list]:
        """This rank's microbatches out of a whole step's rows."""
        share = self.accumulate // self.world_size  # microbatches
        start = self.rank * share * self.rows  # of the step's rows
        return [rows[start + m * self.rows : start + (m + 1) * self.rows] for m in range(share)]


def rows_of(longest: int, batch_tokens: int, sequence_length: int, packed: bool) -> tuple[int, int]:
    """Tokens of a row, and rows of a microbatch.

    Args:
        longest: tokens of the longest example.
        batch_tokens: tokens of a microbatch, padding included.
        sequence_length: tokens of a packed row; 0 takes the longest example.
        packed: several examples may share a row.

    Raises:
        ConfigError: a microbatch would not hold one row.
    """
    if sequence_length > batch_tokens:
        raise ConfigError(
            f"sequence_length = {sequence_length} is more than batch_tokens = {batch_tokens}, and "
            "a microbatch holds at least one row",
            where="[train]",
            remedy=f"Set batch_tokens to {sequence_length} or more, or sequence_length to "
            f"{batch_tokens} or less (0: the longest example).",
        )
    capacity = min(longest, batch_tokens)
    if packed and sequence_length:
        capacity = sequence_length
    return capacity, batch_tokens // capacity


def row_plan(main: RecordSource, geometry: Geometry, seed: int, shuffle_shards: int) -> RowPlan:
    """Which examples share a row, and the order of rows, of a main cache (see `RowPlan`)."""
    shards = np.fromiter((main.shard_of(i) for i in range(len(main))), dtype=np.int64)
    return RowPlan(
        lengths_of(main), shards, geometry.capacity, seed, shuffle_shards, geometry.packed
    )


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
        self.plan = row_plan(sources[""], geometry, seed, shuffle_shards)
        self._records = Records(sources, signals, pictures)
        self.geometry, self._workers, self._pin_memory = geometry, workers, pin_memory

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

    def once(self) -> Iterator[tuple[DistillBatch, bool]]:
        """This rank's microbatches of one epoch, every example once over all ranks.

        Every rank gets as many; False stands beside one that another rank counts.
        """
        size, world_size = self.geometry.rows, self.geometry.world_size
        rows = self.plan.epoch(0)
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        for first in range(0, len(parts), world_size):
            own = first + self.geometry.rank
            yield self._batch(parts[own if own < len(parts) else first]), own < len(parts)

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
        answers = [[self._records.read(number) for number in row] for row in rows]
        batch = self._records.batch(answers, self.geometry.capacity, self.geometry.padding_free)
        return batch.pin_memory() if self._pin_memory else batch


def _results(step: tuple[list[Future], Position]) -> tuple[list[DistillBatch], Position]:
    futures, end = step
    return [future.result() for future in futures], end
