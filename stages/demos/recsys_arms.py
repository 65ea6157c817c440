"""The arms of the recommender demo: what each student learns from, and how it is judged.

One idea: students differ in their objectives and their seed, in nothing else, so differences
between arms are paired by seed. Weights go out by the validation rows; what is reported is from the
test rows.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.cache_schemas.errors import PlanMismatch
from stillroom.cache_schemas.manifest import Plan
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.cache.writer import CacheWriter
from stillroom.pipeline.capture.items import bare
from stillroom.pipeline.config import Run
from stillroom.pipeline.config.recommending import Distilled
from stillroom.pipeline.config.training import Objective
from stillroom.pipeline.corpus.files import Corpus
from stillroom.pipeline.corpus.splits import canonical_json
from stillroom.pipeline.evaluation.ranking import student_ranks
from stillroom.pipeline.record import TeacherRecord
from stillroom.pipeline.student.recommenders.ranks import measures
from stillroom.pipeline.training.recommending import train_recommender

SHUFFLED = "candidates-shuffled"
ALPHA, LAMBDA = 0.5, 0.8
"""Weights of DROS and of the ranking distillation, as in DLLM2Rec's README and paper."""
BASE: list[dict[str, Any]] = [{"name": "next_item"}, {"name": "dros", "weight": ALPHA}]
PART = Distilled(cache="items")


def ranked(cache: str = "candidates", **options: Any) -> list[dict[str, Any]]:
    """The base and a ranking distillation with these options."""
    line: dict[str, Any] = {"name": "ranking_distillation", "cache": cache, "weight": LAMBDA}
    return [*BASE, line | {"options": {"dros": ALPHA} | options}]


def only(name: str) -> dict[str, Any]:
    """Options that switch two of the three weights off."""
    return {n: float(n == name) for n in ("position", "confidence", "consistency")}


ARMS: dict[str, list[dict[str, Any]]] = {
    "none": BASE,
    "uniform": ranked(weights="uniform"),
    "position": ranked(**only("position")),
    "confidence": ranked(**only("confidence")),
    "consistency": ranked(**only("consistency")),
    "all": ranked(),
    "embedding": BASE,
    "all_embedding": ranked(),
    "hint": [*BASE, {"name": "item_hint", "cache": "items", "weight": 0.1}],
    "shuffled": ranked(SHUFFLED),
}
WITH_EMBEDDING = {"embedding", "all_embedding"}


def arm_of(run: Run, arm: str, seed: int, lines: list[dict[str, Any]], steps: int) -> Run:
    """The run of one student."""
    assert run.train is not None
    assert run.recommender is not None
    names = ("candidates", "items", "perfect", SHUFFLED)
    caches = {n: str(run.path(n)) for n in names if run.path(n, "manifest.json").exists()}
    changed = {"corpus": str(run.path("corpus")), "caches": caches, "seed": seed, "steps": steps}
    changed["checkpoint_every"] = steps
    part = PART if arm in WITH_EMBEDDING else None
    return run.model_copy(
        update={
            "name": f"{arm}-{seed}",
            "directory": str(run.path("students", f"{arm}-{seed}-{steps}")),
            "objective": tuple(Objective(**line) for line in lines),
            "train": run.train.model_copy(update=changed),
            "recommender": run.recommender.model_copy(update={"seed": seed, "distilled": part}),
        }
    )


def measured(
    run: Run, arm: str, seed: int, steps: int, lines: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Train and judge one student, or read what was measured before."""
    made = arm_of(run, arm, seed, ARMS[arm] if lines is None else lines, steps)
    path, asked = made.path("measured.json"), settings_of(made)
    if not path.exists():
        result = train_recommender(made)
        assert made.recommender is not None
        rank = student_ranks(
            Path(result.student), Corpus.open(run.path("corpus")), made.recommender.exclude_seen
        )
        facts = in_short(rank) | {"seconds": round(result.seconds, 1), "of": asked}
        path.write_text(json.dumps(facts) + "\n")
    found = json.loads(path.read_text())
    if found.get("of", asked) != asked:
        raise PlanMismatch(
            "was measured with other settings, another corpus or other caches",
            expected="those of the run file, so that arms can be compared",
            where=str(path),
            remedy="Set them back, use another run directory, or delete students/ in this one.",
        )
    return found


def settings_of(made: Run) -> str:
    """A digest over all that makes a student's measures what they are."""
    assert made.train is not None
    assert made.recommender is not None
    left_out = {"caches", "corpus", "checkpoint_every", "keep_last", "log_every", "tracker"}
    tables = [made.train.model_dump(mode="json", exclude=left_out)]
    tables += [line.model_dump(mode="json") for line in made.objective]
    tables += [made.recommender.model_dump(mode="json"), Corpus.open(made.train.corpus).digest]
    part = made.recommender.distilled
    used = {line.cache for line in made.objective} | ({part.cache} if part else set())
    for name in sorted(used & made.train.caches.keys()):
        plan = TeacherCache.open(made.train.caches[name]).plan
        tables.append({name: plan.digest})
    return hashlib.sha256(canonical_json(tables)).hexdigest()


def in_short(rank: np.ndarray) -> dict[str, float]:
    """HR and NDCG at 10 and 20 of ranks [R]."""
    found = measures(rank, (10, 20))
    return {
        f"{name}{cut}": float(found[f"{name}@{cut}"].mean())
        for cut in (10, 20)
        for name in ("hr", "ndcg")
    }


def shuffle(source: Path, target: Path, seed: int = 0) -> None:
    """A cache in which every history has another history's list: a control."""
    cache = TeacherCache.open(source)
    order = np.random.default_rng(seed).permutation(len(cache))
    order = np.where(order == np.arange(len(cache)), np.roll(order, 1), order)
    facts = {**cache.plan.facts, "corpus": {**cache.plan.facts["corpus"], "shuffled": 1}}
    records = [cache.read(number) for number in range(len(cache))]
    write_records(
        target,
        Plan(facts),
        [TeacherRecord(r.example, 0, records[o].signals) for r, o in zip(records, order)],
    )


def write_lists(
    target: Path,
    corpus: Corpus,
    rows: list[tuple[str, np.ndarray, np.ndarray]],
    said: str,
    split: str = "train",
) -> None:
    """A cache of lists that no model wrote.

    Args:
        rows: (example id, places, distances) of the split's questions.
        said: what made them, for the plan.
        split: `train`, or `heldout` for the test's.
    """
    catalogue = corpus.facts["catalogue"]
    examples = dict(zip(corpus.split(split).ids(), corpus.split(split)))
    capture = {"profile": "portable", "k": 0, "candidates": len(rows[0][1]), "method": said}
    plan = Plan.make(
        teacher={"vocab_size": 1, "architecture": said},
        engine={"name": said},
        tokenizer=corpus.facts["tokenizer"],
        corpus={"digest": corpus.digest, "split": split},
        capture=capture | {"catalogue": catalogue, "examples_per_shard": 512},
        num_examples=len(rows),
        max_tokens=1,
        signals={
            "rows": [],
            "dense": {},
            "examples": ["candidate_distances", "candidate_ids"],
        },
    )
    records = [
        TeacherRecord(
            bare(examples[name]),
            0,
            {
                "candidate_ids": ids.astype(np.int32),
                "candidate_distances": distances.astype(np.float32),
            },
        )
        for name, ids, distances in rows
    ]
    write_records(target, plan, records)


def write_records(target: Path, plan: Plan, records: list[TeacherRecord]) -> None:
    """Seal a cache of these records."""
    writer = CacheWriter.open(target, plan)
    for shard in writer.missing():
        writer.write(shard, [records[number] for number in plan.shard_range(shard)])
    writer.seal()
