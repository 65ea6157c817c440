"""Packed microbatches of a cache as an iterable data set that can be stopped and gone on with.

One idea: the order of `stillroom train` is a pure function of the cache, a seed and a position, so
the state of a stream is three integers, and workers and ranks deal the same steps out among
themselves. It decodes what it is asked for and computes no loss.
"""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from stillroom.cache_schemas.errors import PlanMismatch
from stillroom.pipeline.data.loader import Geometry, row_plan, rows_of
from stillroom.pipeline.data.packing import Position
from stillroom.pipeline.doors.cached import CachedBatch, CachedDataset


class PackedStream(IterableDataset):
    """`steps` microbatches for this rank, epoch after epoch: `DataLoader(..., batch_size=None)`.

    With torchdata's `StatefulDataLoader` it goes on where it was stopped, whatever was prefetched;
    the number of workers must then stay: another one is refused, from or to 0 by torchdata itself
    ("State doesn't contain key ...").

    Args:
        data: the cache and what is to be learned.
        steps: microbatches of this rank.
        batch_tokens: tokens of one microbatch, padding included.
        sequence_length: tokens of a packed row; 0 takes the longest example of the cache.
        seed: of the order.
        rank: this process.
        world_size: processes, each with its own microbatch of every step.
        shuffle_shards: shards that are shuffled together.

    Raises:
        ConfigError: `sequence_length` is more than `batch_tokens`.
    """

    def __init__(
        self,
        data: CachedDataset,
        steps: int,
        batch_tokens: int = 2048,
        sequence_length: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle_shards: int = 16,
    ):
        self.data, self.steps, self.seed, self.shuffle_shards = data, steps, seed, shuffle_shards
        longest = int(data.lengths.max())
        capacity, rows = rows_of(longest, batch_tokens, sequence_length, data.packed)
        self.geometry = Geometry(
            capacity, rows, world_size, rank, world_size, data.padding_free, data.packed
        )
        self._start = self._next = (0, Position())  # step, and where its rows begin

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[CachedBatch]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        main = self.data.sources[""]
        plan = row_plan(main, self.geometry, self.seed, self.shuffle_shards)
        step, position = self._start
        self._start = (0, Position())  # for whoever iterates again
        while step < self.steps:
            rows, position = plan.take(position, self.geometry.accumulate * self.geometry.rows)
            step += 1
            self._next = (step, position)
            if (step - 1) % workers == number:
                (own,) = self.geometry.own(rows)
                answers = [[self.data[one] for one in row] for row in own]
                yield self.data.batch(answers, self.geometry.capacity)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, and what it is of, as plain data."""
        step, position = self._next
        return {"step": step, "epoch": position.epoch, "row": position.row, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            PlanMismatch: it is the state of another stream.
        """
        for key, wanted in self._identity().items():
            if state.get(key) != wanted:
                raise PlanMismatch(
                    f"the state is of a stream with {key} = {state.get(key)!r}",
                    expected=f"{wanted!r}",
                    where="PackedStream",
                    remedy="Set it back, or start the stream anew.",
                )
        self._start = self._next = (state["step"], Position(state["epoch"], state["row"]))

    def _identity(self) -> dict[str, Any]:
        geometry, worker = self.geometry, get_worker_info()
        return {
            "num_workers": worker.num_workers if worker else 0,
            "cache": self.data.digest,
            "seed": self.seed,
            "capacity": geometry.capacity,
            "rows": geometry.rows,
            "packed": geometry.packed,
            "rank": geometry.rank,
            "world_size": geometry.world_size,
            "shuffle_shards": self.shuffle_shards,
        }
