"""Candidates: the items a teacher ranks best after each history, into a cache of their own.

One idea: a history is an example of the corpus and its answer is a record like any other, so
shards, receipts, resuming, Ray and sealing are those of any capture. Places are of the catalogue
that the plan names. What is asked is in `candidate_engines`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from stillroom.cache_schemas.manifest import Manifest, Plan
from stillroom.pipeline.cache.writer import CacheWriter
from stillroom.pipeline.capture.candidate_engines import Grounded, Scored, Shelf
from stillroom.pipeline.capture.items import open_items_of, read_items, state_capture
from stillroom.pipeline.capture.job import Notes, OnError, Task, compare, fill
from stillroom.pipeline.capture.nearest import Nearest
from stillroom.pipeline.capture.plan import check_tokenizer, engine_facts, longest
from stillroom.pipeline.capture.progress import CaptureProgress
from stillroom.pipeline.config import Capture, Run, Teacher, require
from stillroom.pipeline.config.recommending import Candidates
from stillroom.pipeline.corpus.files import Corpus
from stillroom.pipeline.corpus.histories import (
    Histories,
    open_catalogue,
    open_histories,
    open_items,
)
from stillroom.pipeline.corpus.item_questions import PARTS, settings_in
from stillroom.pipeline.corpus.tokenizer import CorpusTokenizer
from stillroom.pipeline.record import Example
from stillroom.pipeline.teacher.definition_check import Question
from stillroom.pipeline.teacher.facts import teacher_facts
from stillroom.pipeline.teacher.opening import open_engine, open_writing_engine
from stillroom.pipeline.teacher.protocol import Engine, EngineName, TeacherEngine

NOT_IN_THE_PLAN = {"k", "batch", "check", "histories_per_shard"}
"""Keys of [candidates] that the plan names otherwise, or that change no answer."""


def capture_candidates(
    run: Run,
    *,
    engine: EngineName = "vllm",
    rank: int = 0,
    world_size: int = 1,
    on_error: OnError = "stop",
    split: str = "train",
    location: str = "",
    on_progress: Callable[[CaptureProgress], None] | None = None,
) -> Manifest | None:
    """Answer what is missing of a run's histories and seal the cache when nothing is.

    Args:
        run: needs [candidates], [items], [teacher], a corpus of interactions, and the sealed items
            where the method needs them.
        split: `train` asks about training rows, `heldout` about the test's.
        location: directory or URL of the cache; empty takes `<run.directory>/candidates`, or
            `candidates-test`.
        engine, rank, world_size, on_error, on_progress: as for `capture.capture`.

    Returns:
        The manifest, or None while other workers' shards are missing.

    Raises:
        PlanMismatch: the cache there, or that of the items, has another plan.
        CacheError: the items are not captured yet.
        ConfigError: more candidates than there can be.
    """
    task = open_task(run, engine, split, location)
    notes = Notes(run.path("candidate-notes"), rank, on_error)
    return fill(task.writer, task.examples, task.start, notes, rank, world_size, on_progress)


def default_location(run: Run, split: str) -> str:
    """Where a run keeps the candidates of a split; those of test rows under the name of earlier
    releases where they lie there."""
    if split == "train":
        return str(run.path("candidates"))
    before = run.path("candidates-heldout")
    return str(before if before.exists() else run.path("candidates-test"))


def open_task(run: Run, engine: EngineName, split: str, location: str = "") -> Task:
    """Plan the candidates of a run and open their cache; see `capture_candidates`."""
    table: Candidates = require(run.candidates, "candidates", run.directory)
    teacher = require(run.teacher, "teacher", run.directory)
    corpus = Corpus.open(run.path("corpus"))
    catalogue, histories = open_catalogue(corpus), open_histories(corpus)
    check_tokenizer(corpus, teacher)
    table.check_fits(len(catalogue))
    items = open_items_of(run, corpus, engine) if needs_items(table) else None
    asked = questions(corpus, histories, split, table.histories_per_user)
    plan = make_plan(run, corpus, split, engine, len(asked), items.plan.digest if items else "")
    writer = CacheWriter.open(location or default_location(run, split), plan)

    def start(scale: float) -> Engine:
        shelf = Shelf(
            table,
            settings_in(corpus),
            CorpusTokenizer.open("", teacher.model, teacher.revision, teacher.trust_remote_code),
            catalogue.titles,
            _windows(corpus, histories, split),
            Nearest(read_items(items), table.exact) if items else None,
            _popular(histories, len(catalogue)),
        )
        room = max(longest(corpus), max(len(item.token_ids) for item in open_items(corpus)))
        opened, wanted = _open(run, teacher, engine, room, scale)
        tokens = corpus.facts["counts"][split]["tokens"]
        question = Question(teacher, wanted, asked, None, tokens, "candidates")
        compare(writer, engine, opened, question)
        if table.method == "scored":
            return Scored(opened, shelf)
        return Grounded(opened, shelf, require(run.items, "items", run.directory))

    return Task(writer, asked, start)


def needs_items(table: Candidates) -> bool:
    """Whether the items must have been embedded before."""
    return table.method == "grounded" or table.shortlist == "similar"


def questions(corpus: Corpus, histories: Histories, split: str, per_user: int) -> Sequence[Example]:
    """The examples of a split that a teacher is asked about, in the corpus's order.

    Args:
        per_user: the latest this many of each user; 0 takes all.
    """
    examples = corpus.split(split)
    if not per_user:
        return examples
    rows = histories.rows(PARTS[split])
    owners = histories.owners(rows)
    following = np.searchsorted(owners, owners, side="right") - np.arange(len(rows))
    kept = rows[following <= per_user]
    wanted = set(histories.example_ids.take(kept).to_pylist())
    numbers = [number for number, name in enumerate(examples.ids()) if name in wanted]
    return _Some(examples, numbers)


def make_plan(
    run: Run, corpus: Corpus, split: str, engine: EngineName, count: int, items: str
) -> Plan:
    """The plan of a run's candidates.

    Args:
        count: questions.
        items: digest of the plan of the item embeddings; "" where none are used.
    """
    table: Candidates = require(run.candidates, "candidates", run.directory)
    teacher = require(run.teacher, "teacher", run.directory)
    capture = table.model_dump(mode="json", exclude=NOT_IN_THE_PLAN)
    capture |= {"profile": "portable", "k": 0, "candidates": table.k, "items": items}
    capture |= {"catalogue": corpus.facts["catalogue"]}
    if table.method == "scored" and table.shortlist == "popular":
        # Earlier releases counted targets alone: the shortlists differ, so the caches do.
        capture |= {"popular_by": "training interactions"}
    names = ["candidate_distances", "candidate_ids"]
    names += ["written_ids"] * (table.method == "grounded")
    return Plan.make(
        teacher=teacher_facts(teacher, engine),
        engine=engine_facts(engine),
        tokenizer=corpus.facts["tokenizer"],
        corpus={"digest": corpus.digest, "split": split},
        capture=capture | {"examples_per_shard": table.histories_per_shard},
        num_examples=count,
        max_tokens=1,
        signals={"rows": [], "dense": {}, "examples": names},
    )


class _Some(Sequence[Example]):
    """Some examples of a split, read when they are asked for."""

    def __init__(self, examples: Sequence[Example], numbers: list[int]):
        self._examples, self._numbers = examples, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _Some(self._examples, self._numbers[index])
        return self._examples[self._numbers[index]]


def _open(
    run: Run, teacher: Teacher, name: EngineName, window: int, scale: float
) -> tuple[TeacherEngine, Capture]:
    """The teacher's engine, and what it is asked for.

    Args:
        window: tokens of the longest question or item; a written title comes on top of either.
    """
    table = require(run.candidates, "candidates", run.directory)
    if table.method == "scored":
        wanted = Capture(k=1, entropy=False, check=table.check)
        return open_engine(name, teacher, wanted, max_tokens=0, batch_scale=scale), wanted
    wanted = state_capture(require(run.items, "items", run.directory), table.check)
    tokens = window + table.written_tokens
    return open_writing_engine(name, teacher, wanted, tokens, scale), wanted


def _windows(corpus: Corpus, histories: Histories, split: str) -> Callable[[str], np.ndarray]:
    """Example id -> the items in its prompt; where items of one title make one question of several
    histories, those of all."""
    rows = histories.rows(PARTS[split])
    names = histories.example_ids.take(rows).to_pylist()
    asked: dict[str, list[int]] = {}
    for name, row in zip(names, rows.tolist()):
        asked.setdefault(name, []).append(row)
    return partial(_window, histories, asked, settings_in(corpus).history)


def _window(histories: Histories, rows: dict[str, list[int]], length: int, name: str) -> np.ndarray:
    found = histories.windows(np.array(rows[name]), length, -1).ravel()
    found = found[found >= 0]
    return found[np.sort(np.unique(found, return_index=True)[1])]


def _popular(histories: Histories, items: int) -> np.ndarray:
    """Places by how often they are taken in training; equal ones in catalogue order."""
    return np.argsort(-histories.training_counts(items), kind="stable")
