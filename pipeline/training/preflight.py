"""All that a run file names, checked in one pass before a model is loaded.

One idea: caches, held-out sets, objectives, sources, configs, weights and trackers can be looked up
without any weights; so they are, all of them, and what is wrong is told together. What it opens is
what training uses. It loads and writes nothing.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from stillroom.cache_schemas.errors import ConfigError, StillroomError
from stillroom.pipeline.config import Run, require
from stillroom.pipeline.config.strict import nearest
from stillroom.pipeline.config.training import Train
from stillroom.pipeline.objectives.combine import terms_of
from stillroom.pipeline.objectives.registry import CacheFacts
from stillroom.pipeline.objectives.weighting import Term
from stillroom.pipeline.student.skeleton import config_source, positions_of, skeleton
from stillroom.pipeline.training.coverage import check_every_objective_has_rows, check_sources
from stillroom.pipeline.training.held_out import HeldOut, check_apart, heldout_sets, judge, title
from stillroom.pipeline.training.parallel import Parallel
from stillroom.pipeline.training.run import (
    cache_locations,
    facts_of,
    freeze,
    geometry_of,
    longest_of,
    opened,
    with_joined,
)

Found = TypeVar("Found")


@dataclass(frozen=True)
class Named:
    """What a run file names, opened and checked.

    Attributes:
        caches: training caches by name; "" is the main one.
        images: caches of vision targets by name.
        facts: of both.
        terms: the objectives.
        heldout: held-out sets.
        notes: what a person should know and need not put right.
    """

    caches: Mapping[str, Any]
    images: Mapping[str, Any]
    facts: Mapping[str, CacheFacts]
    terms: list[Term]
    heldout: list[HeldOut]
    notes: tuple[str, ...]

    def titled_caches(self) -> dict[str, Any]:
        """Every cache of texts by what a person calls it."""
        trained = {f"cache '{name or 'train.cache'}'": c for name, c in self.caches.items()}
        held = {title(one.name): c for one in self.heldout for c in one.caches.values()}
        return trained | held


class Findings:
    """Mistakes, gathered instead of raised one by one."""

    def __init__(self):
        self.errors: list[StillroomError] = []

    def of(self, check: Callable[..., Found], *arguments: Any) -> Found | None:
        """What a check returns, or None after it has found a mistake."""
        try:
            return check(*arguments)
        except StillroomError as error:
            self.errors.append(error)
            return None

    def tell(self) -> None:
        """Raise what was found: the one mistake as it is, several as one message."""
        told = list({str(error): error for error in self.errors}.values())
        if len(told) == 1:
            raise told[0]
        if told:
            lines = "".join(f"\n- {error}" for error in told)
            raise ConfigError(f"{len(told)} things to put right:{lines}")


def look_up(
    run: Run, settings: Train, parallel: Parallel, given: Mapping[str, Any] | None = None
) -> Named:
    """Open and check everything that a run file names.

    Args:
        run: the run.
        settings: its [train] table.
        parallel: the ranks.
        given: opened training caches in place of the locations.

    Raises:
        StillroomError: every mistake, in one message.
    """
    found = Findings()
    found.of(require, run.student, "student", run.name)
    found.of(parallel.check_kind, settings)
    found.of(parallel.check_kernel, settings)
    found.of(_check_tracker, settings)
    places = cache_locations(run, settings)
    caches = given or _open(found, places, settings)
    if "" in caches and (joined := found.of(with_joined, caches[""], settings)) is not None:
        caches = {**caches, "": joined}
    images = _open(found, settings.images, settings)
    found.of(_check_names, caches, images)
    facts = {name: facts_of(cache) for name, cache in {**caches, **images}.items()}
    sets = _open_heldout(found, settings)
    terms, heldout = None, []
    # An objective is asked of caches that are there; without one of them it would be blamed.
    if len(images) == len(settings.images) and (given or len(caches) == len(places)):
        terms = found.of(terms_of, run.objective, facts)
    if terms is not None:
        heldout = _judged(found, run, sets, caches, images, terms)
        _check_content(found, settings, parallel, caches, images, terms, heldout)
        if len(heldout) == len(sets):
            found.of(_check_best, settings, heldout)
    everything = [*caches.values(), *(c for one in sets.values() for c in one.values())]
    longest = max((longest_of(cache) for cache in everything), default=2)
    notes = found.of(_check_student, run, settings, longest)
    found.tell()
    told = [note for one in heldout for note in one.notes] + (notes or [])
    return Named(caches, images, facts, terms or [], heldout, tuple(told))


def _open(found: Findings, places: Mapping[str, str], settings: Train) -> dict[str, Any]:
    made = {name: found.of(opened, place, settings) for name, place in places.items()}
    return {name: cache for name, cache in made.items() if cache is not None}


def _open_heldout(found: Findings, settings: Train) -> dict[str, dict[str, Any]]:
    named = found.of(heldout_sets, settings) or {}
    places = {name: {"": one.cache} | one.caches for name, one in named.items()}
    return {name: _open(found, of_set, settings) for name, of_set in places.items()}


def _judged(
    found: Findings, run: Run, sets: Mapping[str, Any], caches, images, terms: list[Term]
) -> list[HeldOut]:
    vision = {name: facts_of(cache) for name, cache in images.items()}
    made = []
    for name, own in sets.items():
        if extra := sorted(own.keys() - caches.keys()):
            found.errors.append(_no_such_cache(name, extra[0], caches))
        elif "" in own:
            facts = {cache: facts_of(opened) for cache, opened in own.items()} | vision
            made.append(found.of(judge, run.objective, name, own, caches, facts, terms))
    return [one for one in made if one is not None and found.of(check_apart, one)]


def _no_such_cache(name: str, extra: str, caches: Mapping[str, Any]) -> ConfigError:
    known = [one for one in caches if one]
    return ConfigError(
        f"names cache '{extra}', which is none of [train.caches]",
        expected=f"some of {', '.join(known)}" if known else "no further caches",
        where=f"{title(name)} caches",
        remedy=nearest(extra, known) or "Leave it out.",
    )


def _check_content(
    found: Findings, settings: Train, parallel: Parallel, caches, images, terms, heldout
) -> None:
    found.of(geometry_of, settings, caches[""], parallel, settings.packing == "auto")
    found.of(check_sources, terms, {**caches, **images})
    found.of(check_every_objective_has_rows, terms, caches, images, "the whole cache")
    for one in heldout:
        where = title(one.name)
        found.of(check_every_objective_has_rows, one.terms, one.caches, images, where)


def _check_names(caches: Mapping[str, Any], images: Mapping[str, Any]) -> None:
    for name in images.keys() & caches.keys():
        raise ConfigError(
            f"two caches are called '{name}'",
            where="[train.images]",
            remedy="Give one of them another name.",
        )


def _check_tracker(settings: Train) -> None:
    tracker = settings.tracker
    needed = () if tracker == "none" else (tracker, "accelerate")
    lacks = [name for name in needed if importlib.util.find_spec(name) is None]
    if lacks:
        raise ConfigError(
            f"tracker = '{tracker}' but {lacks[0]} is not installed",
            where="[train]",
            remedy=f"pip install {' '.join(lacks)}, or set tracker = 'none'.",
        )


def _check_best(settings: Train, heldout: list[HeldOut]) -> None:
    """`keep_best` must be measured, and `patience` is about it."""
    known = [name for one in heldout for name in one.measures]
    if settings.keep_best and settings.keep_best not in known:
        raise ConfigError(
            f"keep_best = '{settings.keep_best}' is not measured",
            expected=f"one of {', '.join(known)}" if known else "a held-out set",
            where="[train]",
            remedy=nearest(settings.keep_best, known) or "Name a heldout_cache.",
        )
    if settings.keep_best and not settings.evaluate_every:
        raise ConfigError(
            "keep_best without evaluate_every",
            where="[train]",
            remedy="Set evaluate_every to the number of steps between two measurements.",
        )
    if settings.patience and not settings.keep_best:
        raise ConfigError(
            "patience without keep_best",
            where="[train]",
            remedy="Name the held-out measure that is to go on falling as keep_best.",
        )


def _check_student(run: Run, settings: Train, longest: int) -> list[str]:
    """What a config tells: names of weights, and positions; returns notes."""
    if run.student is None:
        return []
    source = config_source(run.student, run.teacher, run.path("student-initial"))
    if source is None:
        return []
    model = skeleton(source)
    freeze(model, settings)
    limit, fixed = positions_of(model)
    if not limit or longest <= limit:
        return []
    found = f"examples of {longest} tokens for a student made for {limit} positions"
    if fixed:
        raise ConfigError(
            found,
            expected="a student with a position for every token",
            where=source,
            remedy=f"Prepare and capture with [prepare] window = {limit}, or take a student with "
            "more positions.",
        )
    return [f"{found}: what lies beyond was never trained, and starts out wrong"]
