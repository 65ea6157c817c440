"""How well recommenders and their teachers rank: full ranking over the catalogue on the test rows.

One idea: a student is judged on rows that nothing was chosen on, against every item and not a
sample of them; a teacher that only says K items has no rank beyond them, which counts as a miss.
Definitions: `student.recommenders.ranks`.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.cache_schemas.errors import CacheError, PlanMismatch, StudentError
from stillroom.cache_schemas.layout import MANIFEST
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.capture.candidates import default_location
from stillroom.pipeline.config import Run, require
from stillroom.pipeline.config.strict import nearest
from stillroom.pipeline.corpus.files import Corpus
from stillroom.pipeline.corpus.histories import (
    Catalogue,
    Histories,
    check_catalogue,
    open_catalogue,
    open_histories,
)
from stillroom.pipeline.student.recommenders.export import load
from stillroom.pipeline.student.recommenders.ranks import measures, rank_of, ranks
from stillroom.pipeline.training.run import corpus_of

RESULT = "evaluation.json"


@dataclass(frozen=True, slots=True)
class Ranking:
    """One ranker on the test rows.

    Attributes:
        mean, standard_error: measure -> over rows.
        rows: how many there are.
        empty_lists: of a teacher, how many of its lists have no item; None of a ranker of all
            items.
    """

    mean: dict[str, float]
    standard_error: dict[str, float]
    rows: int
    empty_lists: int | None = None

    @classmethod
    def of(cls, rank: np.ndarray) -> "Ranking":
        """From ranks [R]; 0 stands for an item that is not ranked."""
        found, size = measures(rank), max(len(rank), 1)
        return cls(
            {name: float(values.mean()) for name, values in found.items()},
            {name: float(values.std() / np.sqrt(size)) for name, values in found.items()},
            len(rank),
        )

    @property
    def facts(self) -> dict[str, Any]:
        """For a program; what says nothing is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def evaluate_recommender(run: Run) -> dict[str, Ranking]:
    """The run's student, its teacher where the test's candidates were captured, and the most
    popular items, which need neither; written to `evaluation.json`.

    Raises:
        StudentError: there is no trained student, or it is of another catalogue.
    """
    table = require(run.recommender, "recommender", run.directory)
    corpus = opened_corpus(run)
    found = {
        "student": Ranking.of(student_ranks(run.path("student"), corpus, table.exclude_seen)),
        "most popular": Ranking.of(popular_ranks(corpus, table.exclude_seen)),
    }
    if (said := asked_on_test_rows(run)) is not None:
        lists = teacher_lists(said, corpus)
        ranking = Ranking.of(places_in(lists, _test(corpus)[2]))
        found["teacher"] = replace(ranking, empty_lists=int((lists[:, 0] < 0).sum()))
    text = {name: ranking.facts for name, ranking in found.items()}
    run.path(RESULT).write_text(json.dumps(text, indent=2) + "\n")
    return found


def asked_on_test_rows(run: Run) -> Path | None:
    """Where the teacher's lists about test rows are; None where they are not captured."""
    location = Path(default_location(run, "heldout"))
    return location if (location / MANIFEST).exists() else None


def opened_corpus(run: Run) -> Corpus:
    """What a run trains on, and is judged on."""
    return Corpus.open(corpus_of(run))


def student_ranks(directory: Path, corpus: Corpus, exclude_seen: bool = True) -> np.ndarray:
    """int64 [R]: rank of every test item.

    Raises:
        StudentError: there is no student.
        PlanMismatch: it was trained on another catalogue, or on other sequences.
    """
    model, config = load(directory)
    check_catalogue(config["catalogue"], corpus.facts["catalogue"], str(directory))
    _check_sequences(config, corpus, directory)
    histories, rows, targets = _test(corpus)
    windows = histories.windows(rows, config["history"], config["items"])

    def seen(row: int) -> np.ndarray:
        return histories.seen(int(rows[row]))

    return ranks(model, windows, targets, seen if exclude_seen else None)


def _check_sequences(config: dict[str, Any], corpus: Corpus, directory: Path) -> None:
    """What is a test item here may have been trained on there."""
    found = str(config["identity"].get("corpus", ""))
    if found != corpus.digest:
        raise PlanMismatch(
            f"was trained on the sequences of another corpus, {found[:12]}",
            expected=f"those of {corpus.digest[:12]}, whose test items it has not seen",
            where=str(directory),
            remedy="Train again in a new directory, or set [train] corpus to the one that it was "
            "trained on.",
        )


def popular_ranks(corpus: Corpus, exclude_seen: bool = True) -> np.ndarray:
    """int64 [R]: ranks by how often an item is taken in training, the same list for everybody."""
    histories, rows, targets = _test(corpus)
    items = corpus.facts["catalogue"]["items"]
    counts = histories.training_counts(items).astype(float)
    gone = [histories.seen(int(row)) if exclude_seen else None for row in rows]
    found = [rank_of(counts, int(target), out) for target, out in zip(targets, gone)]
    return np.array(found, dtype=np.int64)


def teacher_ranks(location: str | Path, corpus: Corpus) -> np.ndarray:
    """int64 [R]: place of every test item in the teacher's list; 0 where it is not in it. See
    `teacher_lists`."""
    return places_in(teacher_lists(location, corpus), _test(corpus)[2])


def places_in(lists: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """int64 [R]: place, from 1, of each target [R] in its list of [R, K]; 0 where it is not."""
    same = lists == targets[:, None]
    return np.where(same.any(axis=1), same.argmax(axis=1) + 1, 0).astype(np.int64)


def teacher_lists(location: str | Path, corpus: Corpus) -> np.ndarray:
    """int32 [R, K]: the teacher's candidates of every test row, -1 where there is none.

    Raises:
        CacheError: a test row has no list.
        PlanMismatch: the lists are of another catalogue.
    """
    cache = TeacherCache.open(location)
    where = cache.storage.location
    check_catalogue(cache.plan.facts["capture"]["catalogue"], corpus.facts["catalogue"], where)
    ids = cache.index(["example_id"]).column("example_id").to_pylist()
    numbers = {name: number for number, name in enumerate(ids)}
    histories, rows, _ = _test(corpus)
    found = []
    for name in histories.example_ids.take(rows).to_pylist():
        if name not in numbers:
            raise CacheError(
                f"has no list for question {name[:12]}",
                where=where,
                remedy="Run `stillroom capture --split test` for this corpus.",
            )
        found.append(cache.read(numbers[name], ["candidate_ids"]).signals["candidate_ids"])
    return np.stack(found)


@dataclass(frozen=True, slots=True)
class Recommendation:
    """One item of a list: its id, its title, and the student's score."""

    item_id: str
    title: str
    score: float


def recommend(
    run: Run, top: int, user: str = "", items: tuple[str, ...] = ()
) -> tuple[list[str], list[Recommendation]]:
    """What a run's student recommends after a user's history, or after items named.

    Args:
        top: how many.
        user: as in the interactions; all of the user's items count, the newest too.
        items: item ids, oldest first, in the place of a user.

    Returns:
        Titles of the history that the student read, and the list.

    Raises:
        StudentError: no such user or item.
    """
    table = require(run.recommender, "recommender", run.directory)
    corpus = opened_corpus(run)
    catalogue = open_catalogue(corpus)
    model, config = load(run.path("student"))
    check_catalogue(config["catalogue"], corpus.facts["catalogue"], str(run.path("student")))
    taken = _named(items, catalogue) if items else _of_user(user, open_histories(corpus))
    length = config["history"]
    window = np.full((1, length), config["items"], dtype=np.int64)
    read = taken[-length:]
    window[0, length - len(read) :] = read
    scores = _scores(model, window)
    if table.exclude_seen:
        scores[taken] = -np.inf
    best = np.argsort(-scores, kind="stable")[:top]
    best = best[np.isfinite(scores[best])]
    ids, titles = catalogue.item_ids, catalogue.titles
    listed = [Recommendation(ids[i], titles[i], float(scores[i])) for i in best]
    return [titles[i] for i in read], listed


def _scores(model: Any, window: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.all_scores(model.states(torch.from_numpy(window)))[0].numpy()


def _test(corpus: Corpus) -> tuple[Histories, np.ndarray, np.ndarray]:
    histories = open_histories(corpus)
    rows = histories.rows("test")
    return histories, rows, histories.items[rows].astype(np.int64)


def _named(items: tuple[str, ...], catalogue: Catalogue) -> np.ndarray:
    places = {name: place for place, name in enumerate(catalogue.item_ids)}
    for name in items:
        if name not in places:
            raise StudentError(
                f"no item '{name}'",
                expected=f"ids of the {len(catalogue):,} items of the catalogue",
                remedy=nearest(name, catalogue.item_ids),
            )
    return np.array([places[name] for name in items], dtype=np.int64)


def _of_user(user: str, histories: Histories) -> np.ndarray:
    if user not in histories.users:
        raise StudentError(
            f"no user '{user}'",
            expected=f"one of {len(histories.users):,}, such as '{histories.users[0]}'",
            remedy="Name items with --items for somebody who is not in the interactions.",
        )
    number = histories.users.index(user)
    return histories.items[histories.offsets[number] : histories.offsets[number + 1]]
