"""Whether two teachers are one: the whole identity of one held against that of the other.

One idea: everything that `facts.teacher_facts` records counts, and a caller who may leave something
out says what (how a teacher is run, where that is measured, or does not matter). Facts that a
cache of an earlier release does not record are named, not guessed. It reads no file.
"""

from collections.abc import Mapping
from typing import Any

from stillroom.cache_schemas.differing import differences
from stillroom.cache_schemas.errors import PlanMismatch
from stillroom.pipeline.teacher.overrides import OF_VLLM_ALONE, OVERRIDES

NAMES = frozenset({"revision"})
"""Facts by which weights are found; the weights themselves are hashed."""
HOW_IT_RUNS = frozenset({"dtype", "quantization", "attention"})
SINCE_CONFIGS = ("config", "trust_remote_code", "files", "code_sha256")
"""Facts that were first recorded together with the whole config."""
SHOWN = 5
"""Differences in one message."""


def check_same_teacher(
    found: Mapping[str, Any],
    wanted: Mapping[str, Any],
    where: str,
    remedy: str,
    *,
    as_run: bool = True,
    may_differ: frozenset[str] = frozenset(),
) -> list[str]:
    """Refuse another teacher.

    Args:
        found, wanted: facts of two teachers, as `facts.teacher_facts` or a plan has them.
        where, remedy: for the error.
        as_run: whether how it is run counts too: dtype, quantisation, attention, engine arguments.
        may_differ: further facts that do not count.

    Returns:
        Names of facts that only one of the two records, for the caller to judge; mostly none.

    Raises:
        PlanMismatch: names every fact that differs.
    """
    unrecorded = _unrecorded(found, wanted)
    left_out = NAMES | may_differ | set(unrecorded) | (frozenset() if as_run else HOW_IT_RUNS)
    mine, theirs = (_counting(facts, left_out, as_run) for facts in (wanted, found))
    if different := differences(mine, theirs):
        more = [f"{len(different) - SHOWN} more"] if len(different) > SHOWN else []
        shown = "; ".join([*different[:SHOWN], *more])
        raise PlanMismatch(f"is another teacher: {shown}", where=where, remedy=remedy)
    return unrecorded


def _unrecorded(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    if ("config" in found) == ("config" in wanted):
        return []
    return [name for name in SINCE_CONFIGS if (name in found) != (name in wanted)]


def _counting(facts: Mapping[str, Any], left_out: frozenset[str], as_run: bool) -> dict[str, Any]:
    """Facts that count; of the engine arguments those that change more than vLLM's noise."""
    given = facts.get("engine_args") or {}
    given = given if isinstance(given, Mapping) else {"": given}  # of a stranger's plan
    kept = {name for name in given if name not in OF_VLLM_ALONE} if as_run else {OVERRIDES}
    arguments = {name: value for name, value in given.items() if name in kept}
    return {k: v for k, v in facts.items() if k not in left_out} | {"engine_args": arguments}
