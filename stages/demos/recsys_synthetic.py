"""Interactions made so that it is known how reliable the teacher is, list by list and item by item.

One idea: users walk over clusters of items by a rule with noise; the teacher's list is drawn from
that very rule, except that in three lists out of ten, and at some places of the others, random
items stand instead; how far an item is from the truth shows in its distance. So equal weights must
help less than weights that tell wrong items from right ones, and a weight that cannot tell lists
apart must miss what only whole lists show.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.pipeline.config import Run
from stillroom.pipeline.corpus.files import Corpus
from stillroom.pipeline.corpus.histories import Histories, open_catalogue, open_histories
from stillroom.pipeline.corpus.preparing import prepare
from stillroom.stages.demos.recsys_arms import ARMS, measured, only, ranked, shuffle, write_lists

CLUSTERS, SIZE, USERS, LENGTH, K = 24, 10, 320, 9, 10
STAYS = 0.85
"""Probability that the next item is of the cluster that follows by rule."""
UNRELIABLE, WRONG = 0.3, 0.3
"""Share of lists that are all wrong; share of places that are wrong in the others."""
RIGHT_FAR, WRONG_FAR = 0.5, 2.5
"""Mean distance of a right and of a wrong item, each with a standard deviation of 0.4."""
LINES: dict[str, list[dict[str, Any]]] = {
    **{name: ARMS[name] for name in ("none", "uniform", "position", "confidence", "consistency")},
    "all": ARMS["all"],
    "confidence_between_lists": ranked(normalise="none", **only("confidence")),
    "all_between_lists": ranked(normalise="none"),
    "perfect_teacher": ranked("perfect", weights="uniform"),
    "shuffled": ARMS["shuffled"],
}


def synthetic(run: Run, seeds: int, steps: int) -> dict[str, Any]:
    """Students of every line on the made-up data; what is there already is kept.

    Args:
        run: of the demo; the study lives below its directory.
        seeds, steps: of the students.

    Returns:
        arms -> measure -> one value per seed, and what the teacher's lists are worth.
    """
    made = make(run)
    arms: dict[str, dict[str, list[float]]] = {}
    for name, lines in LINES.items():
        found = [measured(made, name, seed, steps, lines) for seed in range(seeds)]
        arms[name] = {key: [one[key] for one in found] for key in ("hr10", "ndcg10")}
    return {"arms": arms, "lists": json.loads(made.path("lists.json").read_text())}


def make(run: Run) -> Run:
    """The corpus and three caches of lists: the teacher's, a perfect one's, a shuffled one's."""
    assert run.prepare is not None
    assert run.teacher is not None
    directory = run.path("synthetic")
    source = run.prepare.source[0].model_copy(
        update={"path": str(write_files(directory / "source")), "name": "synthetic"}
    )
    assert source.interactions is not None
    plain = source.interactions.model_copy(update={"min_rating": 0.0, "k_core": 1, "history": 5})
    source = source.model_copy(update={"interactions": plain})
    settings = run.prepare.model_copy(update={"source": (source,)})
    made = run.model_copy(update={"directory": str(directory), "prepare": settings})
    corpus = prepare(settings, run.teacher.model, made.path("corpus"))
    if not made.path("candidates-shuffled", "manifest.json").exists():
        histories = open_histories(corpus)
        rows = teacher_lists(corpus, histories, reliable=False)
        write_lists(made.path("candidates"), corpus, rows, "made up")
        perfect = teacher_lists(corpus, histories, reliable=True)
        write_lists(made.path("perfect"), corpus, perfect, "made up, perfect")
        shuffle(made.path("candidates"), made.path("candidates-shuffled"))
        facts = {"teacher": worth(corpus, histories, rows)}
        facts["perfect"] = worth(corpus, histories, perfect)
        made.path("lists.json").write_text(json.dumps(facts) + "\n")
    return made


def write_files(directory: Path) -> Path:
    """Ratings and titles in MovieLens' layout; the same every time."""
    directory.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    lines = ["userId,movieId,rating,timestamp"]
    for user in range(USERS):
        cluster = int(random.integers(CLUSTERS))
        for time in range(LENGTH):
            lines.append(f"{user},{draw(random, cluster) + 1},5,{time}")
            cluster = follow(cluster) if random.random() < STAYS else int(random.integers(CLUSTERS))
    names = [f"{i + 1},Item {i % SIZE} of group {i // SIZE},x" for i in range(CLUSTERS * SIZE)]
    (directory / "ratings.csv").write_text("\n".join(lines) + "\n")
    (directory / "movies.csv").write_text("\n".join(["movieId,title,genres", *names]) + "\n")
    return directory


def follow(cluster: int) -> int:
    """The cluster that comes next by rule."""
    return (5 * cluster + 7) % CLUSTERS


def popularity() -> np.ndarray:
    """Probability of each item within its cluster, falling."""
    weights = 0.75 ** np.arange(SIZE)
    return weights / weights.sum()


def draw(random: np.random.Generator, cluster: int) -> int:
    """An item of a cluster."""
    return cluster * SIZE + int(random.choice(SIZE, p=popularity()))


def truth(item: int) -> np.ndarray:
    """Numbers of the K most probable next items after an item, best first."""
    return follow(item // SIZE) * SIZE + np.arange(SIZE)


def teacher_lists(
    corpus: Corpus, histories: Histories, reliable: bool
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(example id, places, distances) of every training question, wrong as the module says."""
    catalogue = open_catalogue(corpus)
    place = {int(name) - 1: place for place, name in enumerate(catalogue.item_ids)}
    numbers = [int(name) - 1 for name in catalogue.item_ids]
    random = np.random.default_rng(1)
    rows, done = [], set()
    for row in histories.rows("train"):
        name = histories.example_ids[row].as_py()
        if name in done:
            continue
        done.add(name)
        last = numbers[histories.items[row - 1]]
        right = [place[item] for item in truth(last) if item in place]
        rows.append((name, *_spoilt(random, right, len(catalogue), reliable)))
    return rows


def _spoilt(
    random: np.random.Generator, right: list[int], items: int, reliable: bool
) -> tuple[np.ndarray, np.ndarray]:
    """K places and their distances, nearest first."""
    others = random.permutation(np.setdiff1d(np.arange(items), right))
    listed = np.array([*right, *others][:K])
    wrong = np.arange(K) >= len(right)
    if not reliable:
        wrong |= (random.random() < UNRELIABLE) | (random.random(K) < WRONG)
    listed = np.where(wrong, others[-K:], listed)
    mean = np.where(wrong, WRONG_FAR, RIGHT_FAR + 0.05 * np.arange(K))
    far = np.abs(mean + 0.4 * random.normal(size=K) * (not reliable))
    order = np.argsort(far, kind="stable")
    return listed[order], far[order]


def worth(corpus: Corpus, histories: Histories, rows: list) -> dict[str, float]:
    """How often the item that came is in the list of its training question, and comes first."""
    listed = {name: ids for name, ids, _ in rows}
    hits, first = [], []
    for row in histories.rows("train"):
        ids = listed[histories.example_ids[row].as_py()]
        hits.append(histories.items[row] in ids)
        first.append(histories.items[row] == ids[0])
    return {"hr10": float(np.mean(hits)), "hr1": float(np.mean(first))}
