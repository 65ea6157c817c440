"""Several caches read as one: each text keeps the teacher that was asked about it.

One idea: a teacher for each source of text is a cache for each source; laid end to end they are one
sequence of records, which every objective reads as it reads any other. What a loss is computed with
(tokenizer, vocabulary, lists, temperatures, signals, widths) must be the same in all of them. Two
answers about one text are not chosen between: that is what further caches of one run are for.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import Any

import pyarrow as pa

from stillroom.cache_schemas.errors import PlanMismatch, StudentError
from stillroom.cache_schemas.plan import Plan
from stillroom.pipeline.record import TeacherRecord

SAME = ("k", "tail_draws", "temperatures")
"""Of `[capture]`: what decides how lists are read."""


class Joined:
    """Caches of different texts, in the order given; see `pipeline.data.records.RecordSource`.

    Args:
        caches: two or more.

    Raises:
        PlanMismatch: they cannot be trained from together; what differs is named.
        StudentError: two of them are about the same text.
    """

    def __init__(self, caches: Sequence[Any]):
        self._caches = tuple(caches)
        for number, cache in enumerate(self._caches[1:], 2):
            _check_alike(self._caches[0], cache, number)
        self._ends = list(accumulate(len(cache) for cache in self._caches))
        shards = [1 + cache.shard_of(len(cache) - 1) for cache in self._caches]  # they rise
        self._first_shard = [0, *accumulate(shards)][:-1]
        self._check_distinct()
        self.signals = tuple(self._caches[0].signals)
        self.temperatures = tuple(self._caches[0].temperatures)
        self.plan = _plan([cache.plan for cache in self._caches])

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, number: int, signals: Collection[str] | None = None) -> TeacherRecord:
        """One record, of whichever cache holds it."""
        cache, at = self._place(number)
        return self._caches[cache].read(at, signals)

    def shard_of(self, number: int) -> int:
        """Shards are counted through."""
        cache, at = self._place(number)
        return self._first_shard[cache] + self._caches[cache].shard_of(at)

    def index(self, columns: list[str] | None = None) -> pa.Table:
        """The indexes under each other."""
        return pa.concat_tables([cache.index(columns) for cache in self._caches])

    def _place(self, number: int) -> tuple[int, int]:
        number = range(len(self))[number]
        cache = bisect_right(self._ends, number)
        return cache, number - (self._ends[cache - 1] if cache else 0)

    def _check_distinct(self) -> None:
        ids = self.index(["example_id"]).column("example_id").to_pylist()
        twice, count = Counter(ids).most_common(1)[0]
        if count > 1:
            raise StudentError(
                f"two of the joined caches are about example {twice}",
                expected="each text once",
                remedy="Name the other teacher's cache under caches, with objectives of its own, "
                "or take the text out of one with `stillroom cache subset`.",
            )


def _check_alike(first: Any, other: Any, number: int) -> None:
    """Refuse caches whose records mean different things."""
    for key, wanted in _meaning(first).items():
        found = _meaning(other)[key]
        if found != wanted:
            raise PlanMismatch(
                f"joined cache {number} has {key} = {found!r}",
                expected=f"{wanted!r} as in the first",
                where="joined caches",
                remedy="Capture both alike, or train from them one after the other.",
            )


def _meaning(cache: Any) -> dict[str, Any]:
    facts = cache.plan.facts
    told = {f"[capture] {key}": facts["capture"].get(key) for key in SAME}
    # Caches of before had none and do not say so.
    told["[capture] nucleus"] = facts["capture"].get("nucleus") or 0.0
    widths = {name: one["width"] for name, one in cache.plan.dense_signals.items()}
    return {
        **{f"tokenizer {key}": value for key, value in facts["tokenizer"].items()},
        "vocab_size": facts["teacher"]["vocab_size"],
        **told,
        "signals": sorted(cache.signals),
        "widths": widths,
        "images": bool(facts.get("images")),
    }


def _plan(plans: Sequence[Plan]) -> Plan:
    """The first's facts, with the teachers and digests of all."""
    first, own = plans[0].facts, plans[0].facts["teacher"]
    sizes = {key: own[key] for key in ("vocab_size", "hidden_size") if key in own}
    teacher = sizes | {"joined": [plan.facts["teacher"] for plan in plans]}
    return Plan({**first, "teacher": teacher, "joined": [plan.digest for plan in plans]})
