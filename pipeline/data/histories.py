"""Batches of histories for one rank: an epoch's order, and what a step is made of.

One idea: as for texts, the order of an epoch is a pure function of (rows, seed, epoch), so a
position is two integers and any number of ranks takes the same steps. Teachers' lists are joined
by the hash of what the teacher was asked, never by a number.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from stillroom.pipeline.data.loader import Geometry
from stillroom.pipeline.data.packing import Position


@dataclass(frozen=True, slots=True)
class Lists:
    """A teacher's candidates of some rows.

    Attributes:
        ids: int64 [B, K]; -1 where there is none.
        distances: float32 [B, K]; infinite where there is none.
    """

    ids: torch.Tensor
    distances: torch.Tensor

    def to(self, device: torch.device) -> "Lists":
        """The same on a device."""
        return Lists(self.ids.to(device), self.distances.to(device))


@dataclass(frozen=True, slots=True)
class HistoryBatch:
    """Rows of one microbatch.

    Attributes:
        history: int64 [B, L], places, latest last, padded with N on the left.
        target: int64 [B], the item that came.
        example_ids: of the rows' questions, for messages.
        lists: cache name -> candidates.
    """

    history: torch.Tensor
    target: torch.Tensor
    example_ids: tuple[str, ...]
    lists: Mapping[str, Lists] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Rows: what a recommender reads in the place of tokens."""
        return len(self.target)

    def to(self, device: torch.device) -> "HistoryBatch":
        """The same on a device."""
        lists = {name: found.to(device) for name, found in self.lists.items()}
        return replace(
            self, history=self.history.to(device), target=self.target.to(device), lists=lists
        )


@dataclass(frozen=True)
class Rows:
    """All rows that are trained on.

    Attributes:
        history, target: as in `HistoryBatch`, for every row.
        example_ids: of every row.
        candidates: cache name -> (ids [M, K], distances [M, K]) of its records.
        answers: cache name -> int64 [R], each row's record there; -1 where the teacher was not
            asked.
    """

    history: np.ndarray
    target: np.ndarray
    example_ids: list[str]
    candidates: Mapping[str, tuple[np.ndarray, np.ndarray]]
    answers: Mapping[str, np.ndarray]

    def batch(self, numbers: np.ndarray) -> HistoryBatch:
        """The rows of these numbers."""
        lists = {name: self._lists(name, numbers) for name in self.candidates}
        return HistoryBatch(
            torch.from_numpy(self.history[numbers]),
            torch.from_numpy(self.target[numbers]),
            tuple(self.example_ids[number] for number in numbers),
            lists,
        )

    def answered(self, name: str) -> np.ndarray:
        """bool [R]: whether a cache has a list for a row, and an item in it."""
        ids, where = self.candidates[name][0], self.answers[name]
        return (where >= 0) & (ids[where, 0] >= 0)

    def _lists(self, name: str, numbers: np.ndarray) -> Lists:
        ids, distances = self.candidates[name]
        where = self.answers[name][numbers]
        asked = (where >= 0)[:, None]
        found = np.where(asked, ids[where], -1).astype(np.int64)
        far = np.where(asked, distances[where], np.float32(np.inf)).astype(np.float32)
        return Lists(torch.from_numpy(found), torch.from_numpy(far))


class HistoryLoader:
    """Steps of training, from any position.

    Args:
        rows: what is trained on.
        geometry: rows of a microbatch, and this rank's share of a step.
        seed: of the order.
    """

    def __init__(self, rows: Rows, geometry: Geometry, seed: int):
        self.rows, self.geometry, self._seed = rows, geometry, seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def steps(
        self, position: Position, count: int
    ) -> Iterator[tuple[list[HistoryBatch], Position]]:
        """`count` steps from `position`: this rank's microbatches and the position after each."""
        size = self.geometry.accumulate * self.geometry.rows
        for _ in range(count):
            numbers, position = self._take(position, size)
            parts = self.geometry.own(numbers.tolist())
            yield [self.rows.batch(np.array(part)) for part in parts], position

    def _take(self, position: Position, count: int) -> tuple[np.ndarray, Position]:
        """The next `count` rows; epochs follow without a gap."""
        parts: list[np.ndarray] = []
        epoch, row, left = position.epoch, position.row, count
        while left:
            part = self._epoch(epoch)[row : row + left]
            parts.append(part)
            row, left = row + len(part), left - len(part)
            if row == len(self.rows.target):
                epoch, row = epoch + 1, 0
        return np.concatenate(parts), Position(epoch, row)

    def _epoch(self, number: int) -> np.ndarray:
        if self._order[0] != number:
            random = np.random.default_rng((self._seed, number))
            self._order = (number, random.permutation(len(self.rows.target)))
        return self._order[1]
