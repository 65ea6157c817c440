"""Records in a sequence, and what a slice of one is.

One idea: a slice holds numbers, not records; each record is read when it is asked for. It knows
nothing of files.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import overload

from stillroom.pipeline.plain_text import plain
from stillroom.pipeline.record import TeacherRecord


class Records(Sequence[TeacherRecord]):
    """Records by their numbers."""

    @abstractmethod
    def read(self, number: int) -> TeacherRecord:
        """One record; from the end where the number is negative. IndexError beyond."""

    @overload
    def __getitem__(self, number: int) -> TeacherRecord: ...

    @overload
    def __getitem__(self, number: slice) -> "Part": ...

    def __getitem__(self, number: int | slice) -> "TeacherRecord | Part":
        if isinstance(number, slice):
            return Part(self, range(len(self))[number])
        return self.read(number)


class Part(Records):
    """A slice of a cache.

    Args:
        whole: the cache.
        numbers: which of its examples.
    """

    def __init__(self, whole: Records, numbers: range):
        self._whole, self._numbers = whole, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, number: int) -> TeacherRecord:
        """See `Records.read`."""
        return self._whole.read(self._numbers[number])

    def __repr__(self) -> str:
        return f"{len(self):,} examples of {self._whole!r}"


def in_words(records: Records, where: str, tokens: int, signals: Sequence[str]) -> str:
    """What an open cache is, in three lines."""
    count = f"{len(records):,} examples, {tokens:,} tokens"
    lines = f"{type(records).__name__} at {where}", count, ", ".join(signals)
    return "\n  ".join(map(plain, lines))
