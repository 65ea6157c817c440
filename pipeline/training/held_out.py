"""Held-out sets: text that no step trains on, measured with its own cache's facts.

One idea: an objective is judged on a held-out cache as that cache was captured (its temperatures,
its k, its draws), and it must be the same objective there: same teacher, same tail. What cannot be
measured so is refused when the run starts, not at the first measurement. It takes no steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stillroom.cache_schemas.errors import ConfigError, PlanMismatch, StudentError
from stillroom.pipeline.config.training import HeldOutCaches, Objective, Train
from stillroom.pipeline.objectives.combine import terms_of
from stillroom.pipeline.objectives.divergence import DivergenceOptions
from stillroom.pipeline.objectives.registry import CacheFacts
from stillroom.pipeline.objectives.weighting import Term
from stillroom.pipeline.teacher.sameness import check_same_teacher


@dataclass
class HeldOut:
    """One held-out set.

    Attributes:
        name: key in `[train.heldout]`; empty for `heldout_cache`.
        caches: cache name -> held-out cache, as the training caches are named.
        terms: the objectives with the facts of these caches.
        notes: what a person should know of the figures.
        seen: examples that are trained on too.
        loader: over every example once; set when the student is there.
    """

    name: str
    caches: Mapping[str, Any]
    terms: list[Term]
    notes: tuple[str, ...] = ()
    seen: int = 0
    loader: Any = None

    @property
    def prefix(self) -> str:
        """What stands before an objective's label in the names of this set's measures."""
        return f"{self.name}/" if self.name else ""

    @property
    def measures(self) -> list[str]:
        """Names of what is measured."""
        return [self.prefix + term.label for term in self.terms]


def heldout_sets(settings: Train) -> dict[str, HeldOutCaches]:
    """Every held-out set that a run names; `heldout_cache` is the one without a name.

    Raises:
        ConfigError: `evaluate_every` and nothing to measure on.
    """
    short = {"": HeldOutCaches(cache=settings.heldout_cache)} if settings.heldout_cache else {}
    found = short | dict(settings.heldout)
    if settings.evaluate_every and not found:
        raise ConfigError(
            "evaluate_every without heldout_cache",
            where="[train]",
            remedy="Capture the held-out split (stillroom capture --split heldout) and name it.",
        )
    return found


def measured_by(wanted: str, sets: Sequence[HeldOut]) -> str:
    """A measure and the captures it is taken on, in one text."""
    on = next(own.caches for own in sets if wanted in own.measures)
    return " ".join([wanted, *(on[name].plan.digest for name in sorted(on))])


def title(name: str) -> str:
    """A held-out set as the run file calls it."""
    return f"[train.heldout.{name}]" if name else "[train] heldout_cache"


def judge(
    objectives: Sequence[Objective],
    name: str,
    caches: Mapping[str, Any],
    trained_on: Mapping[str, Any],
    facts: Mapping[str, CacheFacts],
    terms: list[Term],
    where: str = "",
) -> HeldOut:
    """A held-out set whose objectives are those of training.

    Args:
        objectives: the `[[objective]]` lines.
        name: of the set.
        caches: its caches.
        trained_on: the training caches.
        facts: of the held-out caches, and of the caches of vision targets.
        terms: the objectives as they are trained.
        where: the set as messages call it; empty for what the run file calls it.

    Raises:
        ConfigError: an objective's cache has no held-out one.
        PlanMismatch: another teacher, or a tail that the training cache has and this one has not.
        StudentError: the cache lacks a signal or a temperature of an objective.
    """
    where = where or title(name)
    for term in terms:
        _check_there(term, facts, where)
    for own, cache in caches.items():
        _check_teacher(cache.plan.facts["teacher"], trained_on[own].plan.facts["teacher"], where)
    judged = terms_of(objectives, facts, where)
    for term, own in zip(terms, judged, strict=True):
        _check_same(term, own, where)
    notes = [_note_of_lists(*both, where) for both in zip(terms, judged, strict=True)]
    seen = len(_ids(caches[""]) & _ids(trained_on[""]))
    if seen:
        notes.append(f"{where}: {seen} of {len(caches[''])} examples are trained on too")
    return HeldOut(name, caches, judged, tuple(filter(None, notes)), seen)


def check_apart(heldout: HeldOut) -> HeldOut:
    """Refuse a set of nothing but texts that are trained on.

    Raises:
        StudentError: it is one.
    """
    if heldout.seen == len(heldout.caches[""]):
        raise StudentError(
            f"each of its {heldout.seen} examples is trained on",
            expected="text that no step trains on",
            where=title(heldout.name),
            remedy="Capture the held-out split into a directory of its own (stillroom capture "
            "--split heldout --cache DIRECTORY) and name that.",
        )
    return heldout


def _ids(cache: Any) -> set[str]:
    """Made of the content: the same text has the same one in every cache."""
    return set(cache.index(["example_id"]).column("example_id").to_pylist())


def _note_of_lists(trained: Term, judged: Term, where: str) -> str:
    """That another length of list makes another number, in words; empty where it does not."""
    before, now = (_lists(one.facts) for one in (trained, judged))
    options = trained.options
    reads_all = isinstance(options, DivergenceOptions) and not options.k
    if before == now or not reads_all or options.tail == "sampled":
        return ""
    return (
        f"{where}: {trained.label} is measured with {now}, and trained with {before}; the two "
        "values are not comparable"
    )


def _lists(facts: CacheFacts) -> str:
    upto = f", up to a mass of {facts.nucleus:g}" if facts.nucleus else ""
    return f"{facts.k} ids per row{upto}"


def _check_there(term: Term, facts: Mapping[str, CacheFacts], where: str) -> None:
    wanted = term.table.cache
    if wanted in facts:
        return
    raise ConfigError(
        f"names no cache '{wanted}', which objective {term.label} is about",
        where=where,
        remedy=f"Capture '{wanted}' on the held-out split too, and name both: "
        f'[train.heldout.NAME] cache = "...", caches = {{ {wanted} = "..." }}.',
    )


def _check_teacher(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """Refuse a teacher that no training text was asked of; of joined caches each has its own."""
    known = wanted.get("joined", [wanted])
    for own in found.get("joined", [found]):
        _check_one_of(own, known, where)


def _check_one_of(found: Mapping[str, Any], known: Sequence[Mapping[str, Any]], where: str) -> None:
    remedy = "Capture the held-out split with the teacher of the training cache"
    remedy += f", one of the {len(known)} that are joined." if len(known) > 1 else "."
    for wanted in known:
        try:
            _check_same_teacher(found, wanted, where, remedy)
        except PlanMismatch:
            if wanted is known[-1]:
                raise
        else:
            return


def _check_same_teacher(
    found: Mapping[str, Any], wanted: Mapping[str, Any], where: str, remedy: str
) -> None:
    unrecorded = check_same_teacher(found, wanted, where, remedy)
    if unrecorded:
        raise PlanMismatch(
            f"{' and '.join(unrecorded)} of the teacher are recorded in one of the two caches only",
            expected="both by releases that record the same of a teacher",
            where=where,
            remedy="Capture both splits with this release.",
        )


def _check_same(trained: Term, judged: Term, where: str) -> None:
    """Options that depend on the cache must come out alike: one curve, one measure."""
    before, now = trained.options.model_dump(), judged.options.model_dump()
    for key, wanted in before.items():
        if now[key] != wanted:
            raise PlanMismatch(
                f"objective {trained.label} would be measured with {key} = {now[key]!r}",
                expected=f"{wanted!r} as in training",
                where=where,
                remedy="Capture the held-out split with the [capture] of the training cache, or "
                f"give options.{key} in the [[objective]].",
            )
