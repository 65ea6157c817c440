"""Cells of interactions as numbers, times and names, with the row of whatever cannot be one.

One idea: a whole column is tried as one kind, exactly, before a vaguer one, because one order has
to hold for all of it. Which column is which, and what is left out, is not decided here.
"""

import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.corpus.interaction_files import Columns
from stillroom.pipeline.corpus.interaction_tables import EXACT

UNITS = ("s", "us", "ns")
TIMES = (pa.int64(), *(pa.timestamp(unit, zone) for unit in UNITS for zone in (None, "UTC")))
"""What a column of times is tried as; all of it is one of them. Dates either all name a zone or all
do not."""
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
A_TIME = "a number, or a date as 2024-05-31 or 2024-05-31T23:59:59Z"
DATE = r"\d{4}-\d{2}-\d{2}([ T]\d{2}(:\d{2}(:\d{2}(\.\d+)?)?)?)?"
FORMS = {
    "a number": rf"^(?:{NUMBER.pattern})$",
    "a date without a zone": rf"^{DATE}$",
    "a date with a zone": rf"^{DATE}(Z|[+-]\d{{2}}(:?\d{{2}})?)$",
}
"""What a time may look like (RE2); which of them are days of a calendar is Arrow's to say."""


def trimmed(columns: Columns, name: str) -> pa.ChunkedArray:
    """A column without white space around its texts."""
    return pc.call_function("utf8_trim_whitespace", [columns.text(name)])


def filled(columns: Columns, name: str) -> pa.ChunkedArray:
    """The same, of a column that has a text in every row.

    Raises:
        CorpusError: a cell is empty, or goes on in the next line.
    """
    column = trimmed(columns, name)
    check_one_line(columns, name, column)
    empty = np.asarray(pc.call_function("equal", [column, ""]).fill_null(True))
    if empty.any():
        raise CorpusError(f"column '{name}' is empty", where=columns.at(int(np.argmax(empty))))
    return column


def check_one_line(columns: Columns, name: str, column: pa.ChunkedArray) -> None:
    """Refuse names, times and ratings with a line end in them: other rows, in quotes by mistake.

    Raises:
        CorpusError: names the row.
    """
    broken = pc.call_function(
        "match_substring_regex", [column], pc.MatchSubstringOptions(r"[\r\n]")
    )
    rows = np.asarray(broken.fill_null(False))
    if rows.any():
        row = int(np.argmax(rows))
        raise CorpusError(
            f"column '{name}' holds a line end: '{column[row].as_py()[:40]}'",
            where=columns.at(row),
            remedy="A quote that opens in this row closes in a later one: mend either.",
        )


def codes(column: pa.ChunkedArray) -> tuple[list[str], np.ndarray]:
    """Names in their order, and each row's place in them."""
    encoded = column.combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    names = encoded.dictionary.to_pylist()
    order = order_of(names)
    place = np.empty(len(names), dtype=np.int64)
    place[order] = np.arange(len(names))
    return [names[i] for i in order], place[np.asarray(encoded.indices, dtype=np.int64)]


def order_of(names: list[str]) -> list[int]:
    """By number where all are whole numbers, else by text; equal numbers by text."""
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(range(len(names)), key=lambda i: (_by_number(names[i]), names[i]))
    return sorted(range(len(names)), key=names.__getitem__)


def _by_number(digits: str) -> tuple[int, str]:
    """Sorts as the number does, however long it is."""
    bare = digits.lstrip("0")
    return len(bare), bare


def times(columns: Columns, name: str) -> np.ndarray:
    """Whole numbers and dates exactly; other numbers as far as fp64 tells them apart.

    Nanoseconds since 1970 are beyond what fp64 holds, so they must not pass through it.

    Raises:
        CorpusError: a cell is empty or neither, or fp64 does not tell it from its neighbours.
    """
    text = filled(columns, name)
    for kind in TIMES:
        try:
            return np.asarray(text.cast(kind).cast(pa.int64()))
        except pa.ArrowInvalid:
            continue
    _check_one_form(columns, name, text)
    values = numbers(columns, name, A_TIME)
    large = np.abs(values) >= EXACT
    if large.any():
        row = int(np.argmax(large))
        raise CorpusError(
            f"column '{name}' holds '{text[row].as_py()[:40]}'",
            expected="whole numbers of 64 bits, or numbers below 2^53",
            where=columns.at(row),
            remedy="Write times as whole numbers: 64-bit floating point gives many of these one "
            "value, and their order would be lost.",
        )
    return values


def _check_one_form(columns: Columns, name: str, text: pa.ChunkedArray) -> None:
    """Refuse numbers among dates, dates without a zone among those with one, and the reverse.

    Raises:
        CorpusError: names a row of the rarer kind, not the first that is read.
    """
    said = {
        kind: pc.call_function("match_substring_regex", [text], pc.MatchSubstringOptions(form))
        for kind, form in FORMS.items()
    }
    has = {kind: np.asarray(found) for kind, found in said.items()}
    counts = {kind: int(found.sum()) for kind, found in has.items()}
    usual = max(counts, key=counts.__getitem__)
    if not counts[usual] or counts[usual] == len(text):
        return
    row, like = int(np.argmin(has[usual])), int(np.argmax(has[usual]))
    found = f"column '{name}' holds '{text[row].as_py()[:40]}'"
    others = f", as are {counts[usual]:,} of {len(text):,} rows (as '{text[like].as_py()[:40]}')"
    raise CorpusError(
        found,
        expected=usual + others,
        where=columns.at(row),
        remedy="Write all times of the column in one way: their order has to hold for all.",
    )


def numbers(columns: Columns, name: str, expected: str = "a number") -> np.ndarray:
    """A column of numbers, float64.

    Raises:
        CorpusError: a cell is empty or no finite number.
    """
    text = filled(columns, name)
    try:
        values = np.asarray(text.cast(pa.float64()))
    except pa.ArrowInvalid:
        values = np.array([_number(value) for value in text.to_pylist()])
    bad = ~np.isfinite(values)
    if bad.any():
        row = int(np.argmax(bad))
        found = f"column '{name}' holds '{text[row].as_py()[:40]}'"
        raise CorpusError(found, expected=expected, where=columns.at(row))
    return values


def _number(text: str) -> float:
    """Python also reads `1_000` and digits of other scripts, which nobody means by a number."""
    return float(text) if NUMBER.fullmatch(text) else float("nan")
