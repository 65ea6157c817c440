"""Which examples share a packed row, and in which order rows are seen.

One idea: the whole order of an epoch is a pure function of (lengths, shards, seed, epoch), so a
position is two integers and any number of ranks or workers walks the same rows. No record is read
here, and no tensor is made.
"""

from dataclasses import dataclass, field

import numpy as np

from stillroom.cache_schemas.errors import StudentError

OPEN_ROWS = 64
"""Rows that still take examples while packing; more finds better fits and costs more time."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where training stands: rows before `row` of `epoch` have been consumed."""

    epoch: int = 0
    row: int = 0


@dataclass
class RowPlan:
    """Every epoch's packed rows of one cache.

    Attributes:
        lengths: int [examples], tokens of each example.
        shards: int [examples], the shard that holds it.
        capacity: tokens of one packed row.
        seed: of the order.
        window: shards that are shuffled together. Examples of different windows never share a
            row, so at most `window` shards are in use at a time.
        packed: several examples may share a row; otherwise each has its own.
    """

    lengths: np.ndarray
    shards: np.ndarray
    capacity: int
    seed: int = 0
    window: int = 16
    packed: bool = True
    _epochs: dict[int, list[tuple[int, ...]]] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        check_rows_hold(self.lengths, self.capacity)

    def epoch(self, number: int) -> list[tuple[int, ...]]:
        """Rows of one epoch, each a tuple of example numbers; every example is in exactly one."""
        if number not in self._epochs:
            if len(self._epochs) > 1:  # the one that ends and the one that begins
                self._epochs.pop(min(self._epochs))
            self._epochs[number] = self._shuffle_and_pack(number)
        return self._epochs[number]

    def take(self, position: Position, count: int) -> tuple[list[tuple[int, ...]], Position]:
        """The next `count` rows and the position after them; epochs follow without a gap."""
        rows: list[tuple[int, ...]] = []
        epoch, row = position.epoch, position.row
        while len(rows) < count:
            available = self.epoch(epoch)
            part = available[row : row + count - len(rows)]
            rows += part
            row += len(part)
            if row == len(available):
                epoch, row = epoch + 1, 0
        return rows, Position(epoch, row)

    def _shuffle_and_pack(self, number: int) -> list[tuple[int, ...]]:
        random = np.random.default_rng((self.seed, number))
        shards = random.permutation(np.unique(self.shards))
        rows = []
        for start in range(0, len(shards), self.window):
            together = np.isin(self.shards, shards[start : start + self.window])  # bool [examples]
            order = random.permutation(np.flatnonzero(together))
            if self.packed:
                rows += pack(order.tolist(), self.lengths[order].tolist(), self.capacity)
            else:
                rows += [(number,) for number in order.tolist()]
        return rows


def check_rows_hold(lengths: np.ndarray, capacity: int) -> None:
    """Refuse rows that an example does not fit into.

    Args:
        lengths: int [examples], tokens of each example.
        capacity: tokens of a row.

    Raises:
        StudentError: naming the longest example, or that there is none.
    """
    if not len(lengths):
        raise StudentError("the cache holds no examples", remedy="Capture a larger corpus.")
    longest = int(np.argmax(lengths))
    if lengths[longest] > capacity:
        raise StudentError(
            f"example {longest} has {lengths[longest]} tokens",
            expected=f"at most {capacity}, the tokens of a row",
            where="sequence_length, batch_tokens",
            remedy=f"Set batch_tokens to {lengths[longest]} or more, and sequence_length too, "
            "unless it is 0 (then rows are as long as the longest example).",
        )


def pack(items: list[int], lengths: list[int], capacity: int) -> list[tuple[int, ...]]:
    """First-fit packing in the order given.

    Args:
        items: what is packed.
        lengths: size of each item, at most `capacity`.
        capacity: size of a row.

    Returns:
        Rows in the order in which they were opened.
    """
    rows: list[list[int]] = []
    open_rows: dict[int, int] = {}  # row -> tokens still free
    for item, length in zip(items, lengths, strict=True):
        row = next((row for row, space in open_rows.items() if space >= length), None)
        if row is None:
            row = len(rows)
            rows.append([])
            open_rows[row] = capacity
        rows[row].append(item)
        open_rows[row] -= length
        if open_rows[row] < 2:  # an example that predicts something has two tokens
            del open_rows[row]
        elif len(open_rows) > OPEN_ROWS:
            del open_rows[next(iter(open_rows))]  # the one opened first
    return [tuple(row) for row in rows]
