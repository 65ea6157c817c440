"""What a recommender is trained on: the corpus's rows, and what caches say of items and histories.

One idea: caches are about a catalogue, and a place in one means nothing in another; so every cache
is checked against the corpus's before a row is made. Candidates join a row by the hash of its
question.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from stillroom.cache_schemas.errors import ConfigError, StudentError
from stillroom.cache_schemas.signals import ITEM_PREFIX
from stillroom.pipeline.cache.care.empty_lists import EmptyLists
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.capture.items import read_items
from stillroom.pipeline.config import Run
from stillroom.pipeline.config.recommending import OWN_CACHES
from stillroom.pipeline.config.training import Train
from stillroom.pipeline.corpus.files import Corpus
from stillroom.pipeline.corpus.histories import (
    Catalogue,
    Histories,
    check_catalogue,
    open_catalogue,
    open_histories,
)
from stillroom.pipeline.corpus.item_questions import settings_in
from stillroom.pipeline.data.histories import Rows
from stillroom.pipeline.objectives.recommending import INTERACTIONS
from stillroom.pipeline.objectives.registry import CacheFacts
from stillroom.pipeline.training.run import opened


class Interactions:
    """A corpus of interactions with the caches of a run.

    Attributes:
        corpus, catalogue, histories: as prepared.
        length: items of a history.
        caches: name -> cache; all about this catalogue.
    """

    def __init__(self, run: Run, settings: Train):
        self.corpus = Corpus.open(settings.corpus or run.path("corpus"))
        self.catalogue: Catalogue = open_catalogue(self.corpus)
        self.histories: Histories = open_histories(self.corpus)
        self.length = settings_in(self.corpus).history
        self.caches = {
            name: _checked(location, settings, self.corpus)
            for name, location in _locations(run, settings).items()
        }

    @property
    def padding(self) -> int:
        """The place that stands for no item."""
        return len(self.catalogue)

    def facts(self) -> dict[str, CacheFacts]:
        """What objectives must know; "" are the interactions."""
        found = {"": CacheFacts((INTERACTIONS,), (), 0)}
        for name, cache in self.caches.items():
            dense = cache.plan.dense_signals
            widths = {signal: shape["width"] for signal, shape in dense.items()}
            found[name] = CacheFacts(tuple(cache.signals), (), 0, widths)
        return found

    def counts(self) -> torch.Tensor:
        """int64 [N]: how often each item is a training target."""
        targets = self.histories.items[self.histories.rows("train")]
        return torch.from_numpy(np.bincount(targets, minlength=len(self.catalogue)))

    def vectors(self, name: str) -> torch.Tensor:
        """float32 [N, width]: the item embeddings of a cache.

        Raises:
            ConfigError: no such cache.
        """
        if name not in self.caches:
            raise ConfigError(
                f"no cache '{name}'",
                expected=f"one of {sorted(self.caches)}",
                where="[recommender.distilled] cache",
                remedy="Name it under [train.caches], or capture [items] in this run.",
            )
        return torch.from_numpy(read_items(self.caches[name]))

    def rows(self, names: set[str]) -> Rows:
        """The training rows, with the candidates of the caches named.

        Raises:
            StudentError: there is no row, a cache answers none of them or has no item for any, or
                one holds all items.
        """
        numbers = self.histories.rows("train")
        if not len(numbers):
            raise StudentError(
                "no user has an item to train on",
                expected="users with four interactions or more",
                where=str(self.corpus.directory),
            )
        history, target = self.windows(numbers), self.histories.items[numbers].astype(np.int64)
        self._check_negatives(history, target)
        ids = self.histories.example_ids.take(numbers).to_pylist()
        answers = {name: _answers(name, self.caches[name], ids) for name in names}
        lists = {name: _lists(self.caches[name]) for name in names}
        rows = Rows(history, target, ids, lists, answers)
        for name in names:
            if not rows.answered(name).any():
                raise self._nothing_said(name, rows)
        return rows

    def _nothing_said(self, name: str, rows: Rows) -> StudentError:
        cache = self.caches[name]
        found = EmptyLists.of(rows.candidates[name][0], cache.plan)
        return StudentError(
            f"cache '{name}' lists no item for any training row: {found.words}",
            expected="an item in one list at least",
            where=cache.storage.location,
            remedy=f"Look at `stillroom cache show {cache.storage.location}`: another prompt or "
            "teacher has to write titles; or leave out the objectives that need this cache.",
        )

    def _check_negatives(self, history: np.ndarray, target: np.ndarray) -> None:
        """Refuse rows that hold every item: none is left that did not come."""
        items = len(self.catalogue)
        if items > self.length + 1:
            return
        rows = np.concatenate([history, target[:, None]], axis=1)
        full = sum(len(set(row) - {self.padding}) == items for row in rows.tolist())
        if full:
            raise StudentError(
                f"{full} of {len(rows)} training rows hold every one of the {items} items",
                expected="an item in no row's history, to be told from the one that came",
                where=str(self.corpus.directory),
                remedy="Use a larger catalogue (keep_unused_items = true), or a shorter history.",
            )

    def windows(self, rows: np.ndarray) -> np.ndarray:
        """int64 [R, L]: histories of these rows as students read them."""
        return self.histories.windows(rows, self.length, self.padding)


def _locations(run: Run, settings: Train) -> dict[str, str]:
    """Of the run's own those that are there, and those that something asks for: opening one that is
    not says what to do."""
    wanted = {line.cache for line in run.objective}
    if run.recommender is not None and run.recommender.distilled is not None:
        wanted.add(run.recommender.distilled.cache)
    there = {name for name in OWN_CACHES if run.path(name, "manifest.json").exists()}
    own = {name: run.path(name) for name in OWN_CACHES if name in there | wanted}
    return {name: str(path) for name, path in own.items()} | settings.caches


def _checked(location: str, settings: Train, corpus: Corpus) -> TeacherCache:
    cache = opened(location, settings)
    found = cache.plan.facts["capture"].get("catalogue")
    if found is None:
        raise StudentError(
            "is not about a catalogue",
            expected="item embeddings or candidates",
            where=location,
            remedy="Name a cache that [items] or [candidates] made.",
        )
    check_catalogue(found, corpus.facts["catalogue"], location)
    if any(name.startswith(ITEM_PREFIX) for name in cache.signals):
        _check_order(cache, open_catalogue(corpus), location)
    return cache


def _check_order(cache: TeacherCache, catalogue: Catalogue, location: str) -> None:
    """Embedding i must be of item i."""
    found = cache.index(["example_id"]).column("example_id").to_pylist()
    if found != [catalogue.key(place) for place in range(len(catalogue))]:
        raise StudentError(
            "holds the items in another order, or others",
            expected=f"the {len(catalogue)} items of the catalogue in its order",
            where=location,
            remedy="Capture the items again.",
        )


def _answers(name: str, cache: TeacherCache, ids: list[str]) -> np.ndarray:
    """int64 [R]: the record of each question; -1 where the teacher was not asked."""
    kept = cache.index(["example_id"]).column("example_id").to_pylist()
    where: Mapping[str, int] = {example: number for number, example in enumerate(kept)}
    found = np.array([where.get(example, -1) for example in ids], dtype=np.int64)
    if (found < 0).all():
        raise StudentError(
            f"cache '{name}' answers none of the {len(ids)} training rows",
            where=cache.storage.location,
            remedy="It was made from another corpus, prompt or split: capture it from this one.",
        )
    return found


def _lists(cache: TeacherCache) -> tuple[np.ndarray, np.ndarray]:
    """(ids [M, K], distances [M, K]) of every record."""
    names: Any = ("candidate_ids", "candidate_distances")
    records = [cache.read(number, names).signals for number in range(len(cache))]
    return tuple(np.stack([signals[name] for signals in records]) for name in names)  # type: ignore[return-value]
