"""Rows that cannot be used: named up to ten at once, or written down and left out.

One idea: one place decides what a bad row means for a run, wherever it was found to be bad (in its
file, in its columns, by the chat template), so nothing is left out in silence.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.corpus.documents import Document, Rejected

NAMED = 10
LOOKED_AT = 10_000
"""Documents that are looked at after the first bad row, to name others with it."""
FILE = "rejects.jsonl"
Made = TypeVar("Made")
LEAVE_OUT = f'set [prepare] on_error = "skip" to leave such rows out and write them to {FILE}'


class Rejects:
    """What becomes of bad rows in one preparation.

    Args:
        on_error: `[prepare] on_error`.
        path: file for the rows that are skipped.

    Attributes:
        count: rows that were skipped.
    """

    def __init__(self, on_error: Literal["stop", "skip"], path: Path):
        self._skip, self._path = on_error == "skip", path
        self._bad: list[Rejected] = []
        self._looked = 0
        self.count = 0

    @property
    def stopping(self) -> bool:
        """Whether a bad row was found, and the rest is only looked at for others."""
        return bool(self._bad)

    def good(self, rows: Iterable[Document | Rejected]) -> Iterator[Document]:
        """The documents among rows; after a bad one, only as many as are looked at for others.

        Raises:
            CorpusError: enough rows are bad to name them.
        """
        for row in rows:
            if isinstance(row, Rejected):
                self.take(row)
            else:
                yield row
            if self.stopping:
                self._looked += 1
                if self._looked >= LOOKED_AT:
                    break

    def take(self, row: Rejected) -> None:
        """A bad row: to the file, or to those that are named when preparing stops.

        Raises:
            CorpusError: enough are known to name them.
        """
        if not self._skip:
            self._bad.append(row)
            if len(self._bad) == NAMED:
                self.stop()
            return
        self.count += 1
        told = {"row": row.error.where, "reason": _reason(row.error), "begins": row.words}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(told, ensure_ascii=False) + "\n")

    def stop(self) -> None:
        """Stop if rows were bad.

        Raises:
            CorpusError: naming the first ten at most.
        """
        if not self._bad:
            return
        if len(self._bad) == 1:
            raise _with_remedy(self._bad[0].error)
        lines = [f"\n  {row.error}" for row in islice(self._bad, NAMED)]
        count = f"{NAMED} rows or more" if len(lines) == NAMED else f"{len(lines)} rows"
        raise CorpusError(f"{count} cannot be used:{''.join(lines)}\nMend them, or {LEAVE_OUT}")


def _with_remedy(error: CorpusError) -> CorpusError:
    """One bad row's error, with what several are told."""
    if error.remedy:
        return error
    remedy = f"Mend it, or {LEAVE_OUT}."
    return CorpusError(error.found, expected=error.expected, where=error.where, remedy=remedy)


def _reason(error: CorpusError) -> str:
    """An error without its place."""
    text = str(error)
    return text.removeprefix(f"{error.where}: ") if error.where else text
