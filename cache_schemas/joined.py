"""Records of one kind, one after another, that decode as one.

One idea: nearly every stream goes row by row, so the streams of many short records, laid end to
end, are those of one long record, and the same loops decode them at a fraction of the cost. What
does not go row by row (columns, tokens before the rows) is put in order here. How many elements
each record must bring is checked for each by itself, so what is refused alone is refused here too.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from stillroom.cache_schemas.streams import Record, checked, entry_of, unpack

JOINED_ROWS = 1 << 15
"""Rows that are decoded together, at most; a longer record is decoded alone."""


class Joined:
    """Several records behind the interface of one; made by `joined`.

    Args:
        records: alike in their streams, and in whether there are more tokens than rows.

    Attributes:
        rows_of, tokens_of: int64 [N] of each record.
    """

    def __init__(self, records: Sequence[Record]):
        self._records, first = records, records[0]
        self.profile, self.entries = first.profile, first.entries
        self.rows_of = np.array([record.rows for record in records], dtype=np.int64)
        self.tokens_of = np.array([record.tokens for record in records], dtype=np.int64)
        self.rows, self.tokens = int(self.rows_of.sum()), int(self.tokens_of.sum())

    def stream(
        self,
        number: int,
        *dtypes: str,
        rows: int | np.ndarray = 0,
        tokens: int = 0,
        once: int = 0,
    ) -> np.ndarray:
        """As `Record.stream`; elements of all records, in order, in the widest of their dtypes."""
        counts = self._of_rows(rows) + tokens * self.tokens_of + once  # [N]
        entries = [entry_of(record, number, dtypes) for record in self._records]
        for count in (counts.min(), counts.max()):
            checked(int(count), number)
        widest = max({dtype for dtype, _, _ in entries}, key=lambda dtype: dtype.itemsize)
        out = np.empty(int(counts.sum()), dtype=widest)
        unpack(entries, counts.tolist(), out, number)
        return out

    def by_column(self, flat: np.ndarray, width: int) -> np.ndarray:
        """[R, width] of a stream that holds the columns of a record one after another."""
        before, within = _places(self.rows_of)
        step = np.repeat(self.rows_of, self.rows_of)  # from one column to the next
        at = (before * width + within)[:, None] + np.arange(width) * step[:, None]
        return flat[at]

    def in_order(self, prompt: np.ndarray, following: np.ndarray) -> np.ndarray:
        """All tokens, record by record, of those before the ones that follow a row and of these."""
        _, within = _places(self.tokens_of)
        first = np.repeat(self.tokens_of - self.rows_of, self.tokens_of)
        tokens = np.empty(self.tokens, dtype=prompt.dtype)
        tokens[within < first], tokens[within >= first] = prompt, following
        return tokens

    def _of_rows(self, each: int | np.ndarray) -> np.ndarray:
        """int64 [N]: the elements that each record's rows ask for."""
        if isinstance(each, int):
            return each * self.rows_of
        ends = np.cumsum(self.rows_of)
        sums = np.concatenate([[0], np.cumsum(each, dtype=np.int64)])
        return sums[ends] - sums[ends - self.rows_of]


def joined(
    records: Iterable[Record], marks: Sequence[int] = ()
) -> Iterator[tuple[list[int], Joined]]:
    """Records in groups that decode as one, each with the places of its records.

    Args:
        marks: numbers of streams whose very bytes must be equal within a group.
    """
    kinds: dict[tuple, list[int]] = {}
    held = list(records)
    for at, record in enumerate(held):
        own = tuple(_bytes(record, mark) for mark in marks)
        kind = (tuple(record.entries), own, record.tokens > record.rows)
        kinds.setdefault(kind, []).append(at)
    for places in kinds.values():
        for part in _parts(places, held):
            yield part, Joined([held[at] for at in part])


def _parts(places: list[int], held: list[Record]) -> Iterator[list[int]]:
    part: list[int] = []
    rows = 0
    for at in places:
        size = max(held[at].rows, held[at].tokens)
        if part and rows + size > JOINED_ROWS:
            yield part
            part, rows = [], 0
        part.append(at)
        rows += size
    yield part


def _bytes(record: Record, number: int) -> tuple[int, bytes] | None:
    entry = record.entries.get(number)
    return None if entry is None else (entry[1], bytes(entry[2][:64]))


def _places(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(elements before the record, place within it) of every element of records of these sizes."""
    before = np.repeat(np.cumsum(sizes) - sizes, sizes)
    return before, np.arange(len(before)) - before
