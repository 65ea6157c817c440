"""Who took what, when: from files to everybody's sequence, with a rule for every doubt.

One idea: filters are applied in a stated order and count what they leave out; the result does not
depend on the order of lines in a file. The rules: interactions below `min_rating` go; the same
user, item and time twice is one; users and items below the k-core go, again and again; users with
fewer than three interactions go. Interactions of one user at one time are ordered by item id. This
module asks no teacher; questions are `item_questions`.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.config.recommending import Interactions
from stillroom.pipeline.corpus.histories import Catalogue
from stillroom.pipeline.corpus.interaction_cells import (
    check_one_line,
    codes,
    filled,
    numbers,
    order_of,
    times,
    trimmed,
)
from stillroom.pipeline.corpus.interaction_files import Columns

LEAST = 3
"""Interactions of a user: one to train from, one to validate, one to test."""


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
    text = [filled(columns, columns.need(given, usual)) for given, usual in _keys(settings)]
    (users, user), (items, item) = (codes(column) for column in text)
    time = times(columns, columns.need(settings.time, "time"))
    log = Log(users, items, user, item, time)
    rating = columns.pick(settings.rating, "rating")
    if settings.min_rating and not rating:
        columns.need(settings.rating, "rating")
    if settings.min_rating:
        log.keep(numbers(columns, rating) >= settings.min_rating, "interactions_rated_too_low")
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
    keys = trimmed(columns, name := columns.need(settings.item, "item")).fill_null("")
    check_one_line(columns, name, keys)
    ids = keys.to_pylist()
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
    order = [kept[place] for place in order_of([ids[row] for row in kept])]
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
        "interactions_at_one_time_with_another_of_their_user": int(ties.sum()),
        "items_that_share_a_title": len(kept) - len(set(kept.titles)),
    }
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    names = [log.users[i] for i in who]
    return Sequences(names, offsets, place[log.item], kept, dict(log.dropped), facts)
