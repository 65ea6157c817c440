"""How many of a cache's candidate lists have no item in them.

One idea: an empty list is a record like any other and counts as one wherever records are counted,
so a teacher that said almost nothing looks like one that answered everything; this is the one place
that counts lists by what is in them. It judges no list that has an item.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from stillroom.cache_schemas.manifest import Plan
from stillroom.pipeline.cache.reader import TeacherCache

IDS = "candidate_ids"
LOOKED_AT = 4096
"""Lists that an overview reads, evenly over the cache."""


@dataclass(frozen=True, slots=True)
class EmptyLists:
    """A count.

    Attributes:
        empty: lists without an item.
        lists: that were looked at.
        why: what an empty list means in such a cache, in words; may be empty.
    """

    empty: int
    lists: int
    why: str = ""

    @classmethod
    def of(cls, ids: np.ndarray, plan: Plan) -> "EmptyLists":
        """Of lists [M, K], padded with -1 at their ends."""
        grounded = plan.facts["capture"].get("method") == "grounded"
        why = "the teacher wrote no title" if grounded else ""
        return cls(int((ids[:, :1] < 0).all(axis=1).sum()), len(ids), why)

    @property
    def words(self) -> str:
        """As a person is told; "" where no list is empty."""
        why = f" ({self.why})" if self.why else ""
        verb = "is" if self.lists == 1 else "are"
        return f"{self.empty:,} of {self.lists:,} lists {verb} empty{why}" if self.empty else ""


def empty_lists(cache: TeacherCache, most: int = 0) -> EmptyLists | None:
    """Count those of a cache; None where it holds no lists.

    Args:
        most: read this many, evenly over the cache; 0 reads all.
    """
    if IDS not in cache.plan.example_signals:
        return None
    step = -(-len(cache) // most) if most else 1
    names: Any = (IDS,)
    found = [cache.read(n, names).signals[IDS] for n in range(0, len(cache), max(step, 1))]
    return EmptyLists.of(np.stack(found), cache.plan)
