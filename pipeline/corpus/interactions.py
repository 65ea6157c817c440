"""Who took what, when: from files to everybody's sequence, with a rule for every doubt.

One idea: filters are applied in a stated order and count what they leave out; the result does not
depend on the order of lines in a file. The rules: interactions below `min_rating` go; the same
user, item and time twice is one; users and items below the k-core go, again and again; users with
fewer than three interactions go. Interactions of one user at one time are ordered by item id. This
module asks no teacher; questions are `item_questions`.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.config.recommending import Interactions
from stillroom.pipeline.corpus.histories import Catalogue
from stillroom.pipeline.corpus.interaction_files import Columns
from stillroom.pipeline.corpus.interaction_tables import EXACT

LEAST = 3
"""Interactions of a user: one to train from, one to validate, one to test."""
UNITS = ("s", "us", "ns")
TIMES = (pa.int64(), *(pa.timestamp(unit, zone) for unit in UNITS for zone in (None, "UTC")))
"""What a column of times is tried as; all of it is one of them. Dates either all name a zone or all
do not."""
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


@dataclass
class Log:
    """Interactions as numbers.

    Attributes:
        users, items: names, each once, sorted.
        user, item: int64 [N], places in them.
        time: int64 or float64 [N].
        dropped: reason -> how many were left out.
    """

    users: list[str]
    items: list[str]
    user: np.ndarray
    item: np.ndarray
    time: np.ndarray
    dropped: Counter[str] = field(default_factory=Counter)

    def keep(self, inside: np.ndarray, reason: str) -> None:
        """Leave out what is not `inside`, and count it."""
        gone = int((~inside).sum())
        if gone:
            self.dropped[reason] += gone
        self.user, self.item, self.time = self.user[inside], self.item[inside], self.time[inside]


@dataclass(frozen=True, slots=True)
class Sequences:
    """What filters leave.

    Attributes:
        users: one name per sequence, sorted.
        offsets: int64 [U + 1] into `items`.
        items: int32 [N], places in `catalogue`.
        catalogue: the items.
        dropped: reason -> how many were left out.
        facts: counts that a person wants to see.
    """

    users: list[str]
    offsets: np.ndarray
    items: np.ndarray
    catalogue: Catalogue
    dropped: dict[str, int]
    facts: dict[str, Any]


def read_log(columns: Columns, settings: Interactions) -> Log:
    """Interactions of a file, ratings below the least left out.

    Raises:
        CorpusError: a column is missing, or a cell is empty or not a number.
    """
    text = [_filled(columns, columns.need(given, usual)) for given, usual in _keys(settings)]
    (users, user), (items, item) = (_codes(column) for column in text)
    time = _times(columns, columns.need(settings.time, "time"))
    log = Log(users, items, user, item, time)
    rating = columns.pick(settings.rating, "rating")
    if settings.min_rating and not rating:
        columns.need(settings.rating, "rating")
    if settings.min_rating:
        log.keep(_numbers(columns, rating) >= settings.min_rating, "interactions_rated_too_low")
    return log


def read_catalogue(
    columns: Columns, settings: Interactions, empty: str, dropped: Counter[str]
) -> Catalogue:
    """The items of a file, sorted by id.

    Args:
        empty: `error` or `skip`: what an item without a title means.
        dropped: counts what is left out.

    Raises:
        CorpusError: a column is missing, an id is there twice, or a title is empty.
    """
    ids = _trimmed(columns, columns.need(settings.item, "item")).fill_null("").to_pylist()
    named = [columns.need(settings.title, "title")]
    named += [columns.pick(name, "title") for name in settings.text_columns]
    titles, *texts = (
        [_one_line(value) for value in columns.text(name).to_pylist()] for name in named
    )
    _check_unique(columns, ids)
    kept = []
    for row, (item, title) in enumerate(zip(ids, titles)):
        if item and title:
            kept.append(row)
            continue
        if empty == "error":
            raise CorpusError(
                f"item '{item}' has no title" if item else "an item without an id",
                where=columns.at(row),
                remedy='Complete it, or set [prepare] empty_documents = "skip".',
            )
        dropped["items_without_a_title"] += 1
    order = [kept[place] for place in _order([ids[row] for row in kept])]
    template = settings.item_template()
    text = [template.fill(_named(settings, titles, texts, row)) for row in order]
    return Catalogue([ids[row] for row in order], [titles[row] for row in order], text)


def sequences(log: Log, catalogue: Catalogue, settings: Interactions) -> Sequences:
    """Apply every rule of the module.

    Raises:
        CorpusError: an item is not in the catalogue, or nothing is left.
    """
    _only_known(log, catalogue, settings)
    _once(log)
    _core(log, settings.k_core)
    _long_enough(log)
    if not len(log.user):
        reasons = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in log.dropped.items())
        raise CorpusError(
            f"no interaction is left (left out: {reasons or 'none'})",
            where="[prepare.source.interactions]",
            remedy="Lower k_core or min_rating, or use more data.",
        )
    return _sorted(log, catalogue, settings)


def _keys(settings: Interactions) -> tuple[tuple[str, str], ...]:
    return (settings.user, "user"), (settings.item, "item")


def _trimmed(columns: Columns, name: str) -> pa.ChunkedArray:
    return pc.call_function("utf8_trim_whitespace", [columns.text(name)])


def _filled(columns: Columns, name: str) -> pa.ChunkedArray:
    column = _trimmed(columns, name)
    empty = np.asarray(pc.call_function("equal", [column, ""]).fill_null(True))
    if empty.any():
        raise CorpusError(f"column '{name}' is empty", where=columns.at(int(np.argmax(empty))))
    return column


def _codes(column: pa.ChunkedArray) -> tuple[list[str], np.ndarray]:
    """Names in their order, and each row's place in them."""
    encoded = column.combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    names = encoded.dictionary.to_pylist()
    order = _order(names)
    place = np.empty(len(names), dtype=np.int64)
    place[order] = np.arange(len(names))
    return [names[i] for i in order], place[np.asarray(encoded.indices, dtype=np.int64)]


def _order(names: list[str]) -> list[int]:
    """By number where all are whole numbers, else by text; equal numbers by text."""
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(range(len(names)), key=lambda i: (_by_number(names[i]), names[i]))
    return sorted(range(len(names)), key=names.__getitem__)


def _by_number(digits: str) -> tuple[int, str]:
    """Sorts as the number does, however long it is."""
    bare = digits.lstrip("0")
    return len(bare), bare


def _times(columns: Columns, name: str) -> np.ndarray:
    """Whole numbers and dates exactly; other numbers as far as fp64 tells them apart.

    Nanoseconds since 1970 are beyond what fp64 holds, so they must not pass through it.
    """
    text = _filled(columns, name)
    for kind in TIMES:
        try:
            return np.asarray(text.cast(kind).cast(pa.int64()))
        except pa.ArrowInvalid:
            continue
    values = _numbers(columns, name, "a number, or a date as 2024-05-31 or 2024-05-31T23:59:59Z")
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


def _numbers(columns: Columns, name: str, expected: str = "a number") -> np.ndarray:
    text = _filled(columns, name)
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


def _one_line(value: str | None) -> str:
    return " ".join((value or "").split())


def _check_unique(columns: Columns, ids: list[str]) -> None:
    first: dict[str, int] = {}
    for row, item in enumerate(ids):
        if item and first.setdefault(item, row) != row:
            raise CorpusError(
                f"item '{item}' is there twice (first at {columns.at(first[item])})",
                where=columns.at(row),
                remedy="Remove one of the lines.",
            )


def _named(settings: Interactions, titles: list[str], texts: list[list[str]], row: int) -> dict:
    more = dict(zip(settings.text_columns, (column[row] for column in texts)))
    return more | {"title": titles[row]}


def _only_known(log: Log, catalogue: Catalogue, settings: Interactions) -> None:
    """Items by their place in the catalogue; -1 where they are not in it."""
    places = {name: place for place, name in enumerate(catalogue.item_ids)}
    where = np.array([places.get(name, -1) for name in log.items], dtype=np.int64)
    unknown = where[log.item] < 0
    if unknown.any() and settings.unknown_items == "error":
        name = log.items[log.item[int(np.argmax(unknown))]]
        raise CorpusError(
            f"{int(unknown.sum())} interactions are with items outside the catalogue, the first "
            f"with '{name}'",
            where="[prepare.source.interactions] catalogue",
            remedy='Complete the catalogue, or set unknown_items = "skip".',
        )
    log.item, log.items = where[log.item], catalogue.item_ids
    log.keep(~unknown, "interactions_with_items_outside_the_catalogue")


def _once(log: Log) -> None:
    """In the order of users, times and items, each once."""
    order = np.lexsort((log.item, log.time, log.user))
    log.user, log.item, log.time = log.user[order], log.item[order], log.time[order]
    same = np.zeros(len(log.user), dtype=bool)
    same[1:] = (np.diff(log.user) == 0) & (np.diff(log.time) == 0) & (np.diff(log.item) == 0)
    log.keep(~same, "repeated_interactions")


def _core(log: Log, k: int) -> None:
    """Users and items with at least k interactions each."""
    while len(log.user):
        users, items = np.bincount(log.user), np.bincount(log.item)
        inside = (users[log.user] >= k) & (items[log.item] >= k)
        if inside.all():
            return
        log.keep(inside, f"interactions_outside_the_{k}_core")


def _long_enough(log: Log) -> None:
    if not len(log.user):
        return
    short = np.bincount(log.user)[log.user] < LEAST
    lost = len(np.unique(log.user[short]))
    log.keep(~short, "interactions_of_users_with_fewer_than_three")
    if lost:
        log.dropped["users_with_fewer_than_three_interactions"] = lost


def _sorted(log: Log, catalogue: Catalogue, settings: Interactions) -> Sequences:
    used = np.arange(len(catalogue)) if settings.keep_unused_items else np.unique(log.item)
    place = np.full(len(catalogue), -1, dtype=np.int32)
    place[used] = np.arange(len(used), dtype=np.int32)
    unused = len(catalogue) - len(used)
    if unused:
        log.dropped["items_that_nobody_took"] = unused
    columns = (catalogue.item_ids, catalogue.titles, catalogue.texts)
    kept = Catalogue(*([column[i] for i in used] for column in columns))
    who, counts = np.unique(log.user, return_counts=True)
    ties = (np.diff(log.user) == 0) & (np.diff(log.time) == 0)
    facts = {
        "users": len(who),
        "items": len(kept),
        "interactions": len(log.user),
        "at_the_time_of_the_one_before": int(ties.sum()),
        "items_that_share_a_title": len(kept) - len(set(kept.titles)),
    }
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    names = [log.users[i] for i in who]
    return Sequences(names, offsets, place[log.item], kept, dict(log.dropped), facts)
