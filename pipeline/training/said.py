"""What a run file says of a teacher and of a capture, held against what it trains from.

One idea: `[teacher]` and `[capture]` need not be there, and files of the teacher may be gone; but
what is said and can be looked up has to be true, or a curve, a card and a person call one teacher's
answers another's. It downloads nothing. What a capture keeps of it is `capture.plan`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillroom.cache_schemas import layout
from stillroom.cache_schemas.errors import PlanMismatch
from stillroom.cache_schemas.plan import Plan
from stillroom.pipeline.config import Capture, Run, Teacher
from stillroom.pipeline.teacher.facts import facts_here
from stillroom.pipeline.teacher.rows import kept_temperatures
from stillroom.pipeline.teacher.sameness import check_same_teacher

NOT_MEANT = {"check", "examples_per_shard"}
"""Of `[capture]`: how it is done, and where it is cut, which no student learns."""
SINCE = {"nucleus": 0.0}
"""Keys that a plan without them has so."""


def teachers_of(caches: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the plans of caches say of their teachers, each once."""
    found: list[dict[str, Any]] = []
    for cache in caches.values():
        facts = cache.plan.facts["teacher"]
        found += [one for one in facts.get("joined", [facts]) if one not in found]
    return found


def told_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a student's papers say of a teacher, from a plan."""
    return {name: facts[name] for name in ("architecture", "weights_sha256") if name in facts}


def check_teacher(teacher: Teacher | None, taught: list[dict[str, Any]]) -> list[int]:
    """Refuse a `[teacher]` that made none of the caches, as far as that can be seen here.

    Args:
        teacher: as the run file says; how it is run does not matter.
        taught: facts of the caches' teachers.

    Returns:
        Which of these are that teacher; none where it was not looked up.

    Raises:
        PlanMismatch: it is none of them; what differs from the first is named.
    """
    own = facts_here(teacher) if teacher is not None else None
    if own is None or not all("weights_sha256" in facts for facts in taught):
        return []
    remedy = (
        "Name the teacher that made the cache under [teacher], as it was then; or capture with "
        "this one, in another directory."
    )
    same, first = [], None
    for number, facts in enumerate(taught):
        try:
            check_same_teacher(own, facts, "[teacher]", remedy, as_run=False)
            same.append(number)
        except PlanMismatch as error:
            first = first or error
    if first is not None and not same:
        raise first
    return same


def check_own_capture(run: Run) -> None:
    """Refuse a `[capture]` that says something else than the cache in the run's own directory.

    Raises:
        PlanMismatch: names every key that differs.
        ShardCorrupt: the plan cannot be read.
    """
    path = run.path("cache", layout.PLAN)
    if run.capture is None or not path.is_file():
        return
    kept = SINCE | Plan.from_bytes(path.read_bytes(), str(path)).facts["capture"]
    said = _said(run.capture)
    wrong = [key for key in sorted(said) if key in kept and said[key] != kept[key]]
    if wrong:
        raise PlanMismatch(
            "the cache was captured with " + _listed(kept, wrong),
            expected=f"{_listed(said, wrong)}, as [capture] says",
            where=str(path.parent),
            remedy="Set [capture] back to what was captured, or capture anew in another directory.",
        )


def is_own_cache(run: Run, place: str) -> bool:
    """Whether a cache is the one that `stillroom capture` makes of a run file by itself."""
    return "://" not in place and run.path("cache").resolve() == Path(place).resolve()


def _said(capture: Capture) -> dict[str, Any]:
    """Keys that a person wrote, as a plan has them."""
    said = capture.model_dump(mode="json", include=capture.model_fields_set - NOT_MEANT)
    if "temperatures" in said:
        said["temperatures"] = list(kept_temperatures(capture))
    return said


def _listed(table: Mapping[str, Any], keys: list[str]) -> str:
    return ", ".join(f"{key} = {table[key]!r}" for key in keys)
