"""Stage one: run the teacher over a corpus, once, into a cache that survives any interruption.

One idea: a shard is the unit of work and of loss. The plan says what each shard holds; what has no
receipt is scored, handed to the writer and committed; when none is missing the cache is sealed.
Running the same command again is therefore the whole of recovery, and workers of one plan need
nothing from each other. This module draws nothing and starts no cluster.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stillroom.cache_schemas import layout
from stillroom.cache_schemas.manifest import Manifest, Plan, ShardReceipt
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.cache.writer import CacheWriter
from stillroom.pipeline.capture.asking import Asking
from stillroom.pipeline.capture.plan import (
    check_processor,
    check_tokenizer,
    longest,
    make_plan,
    pictures_of,
)
from stillroom.pipeline.capture.progress import CaptureProgress, Totals
from stillroom.pipeline.config import Run, require
from stillroom.pipeline.corpus.preparing import Corpus
from stillroom.pipeline.corpus.preview import text_preview
from stillroom.pipeline.record import Example, TeacherRecord
from stillroom.pipeline.teacher.definition_check import Question, check_definition
from stillroom.pipeline.teacher.facts import model_directory
from stillroom.pipeline.teacher.opening import open_engine as open_named_engine
from stillroom.pipeline.teacher.protocol import (
    Engine,
    EngineName,
    OutOfMemory,
    RejectedExample,
    TeacherEngine,
)

OnError = Literal["stop", "quarantine"]
OpenEngine = Callable[[float], Engine]
"""Starts the engine with its step's token budget scaled; called again after an out-of-memory."""


def capture(
    run: Run,
    *,
    engine: EngineName = "vllm",
    rank: int = 0,
    world_size: int = 1,
    on_error: OnError = "stop",
    split: str = "train",
    location: str = "",
    on_progress: Callable[[CaptureProgress], None] | None = None,
    open_engine: OpenEngine | None = None,
) -> Manifest | None:
    """Score what is missing of a run's cache and seal it when nothing is.

    Args:
        run: needs the tables [teacher] and [capture], and a prepared corpus.
        engine: which one; part of the plan.
        rank, world_size: this worker's share of the shards.
        on_error: `quarantine` puts an example that the teacher cannot answer into `rejects.jsonl`,
            leaves an empty record in its place, and goes on.
        split: which examples of the corpus.
        location: directory or URL of the cache; empty takes `<run.directory>/cache`.
        on_progress: called after every example.
        open_engine: what starts the engine, in place of the one that `engine` names.

    Returns:
        The manifest, or None while other workers' shards are missing.

    Raises:
        PlanMismatch: the cache there has another plan, or the corpus another tokenizer.
        RejectedExample: an example cannot be answered and `on_error` is `stop`.
        TeacherError: the teacher cannot be loaded or served, or ran out of memory twice.
    """
    task = Task.open(run, engine, split, location)
    notes = Notes(run.path(), rank, on_error)
    start = open_engine or task.start
    return fill(task.writer, task.examples, start, notes, rank, world_size, on_progress)


@dataclass(frozen=True, slots=True)
class Task:
    """One capture, opened.

    Attributes:
        writer: where records go.
        examples: what the teacher is asked about, in the plan's order.
        start: starts the engine that answers.
    """

    writer: CacheWriter
    examples: Sequence[Example]
    start: OpenEngine

    @classmethod
    def open(cls, run: Run, engine: EngineName, split: str, location: str = "") -> "Task":
        """Plan a capture and open its cache; see `capture`."""
        teacher = require(run.teacher, "teacher", run.directory)
        table = require(run.capture, "capture", run.directory)
        corpus = Corpus.open(run.path("corpus"))
        check_tokenizer(corpus, teacher)
        check_processor(corpus, teacher)
        plan = make_plan(corpus, split, teacher, table, engine)
        preview = text_preview(str(model_directory(teacher)), teacher.trust_remote_code)
        writer = CacheWriter.open(location or str(run.path("cache")), plan, preview)

        examples, pictures = corpus.split(split), pictures_of(corpus)

        def start(scale: float) -> Engine:
            opened = open_named_engine(
                engine,
                teacher,
                table,
                max_tokens=longest(corpus),
                batch_scale=scale,
                pictures=pictures,
            )
            tokens = corpus.facts["counts"][split]["tokens"]
            question = Question(teacher, table, examples, pictures, tokens)
            compare(writer, engine, opened, question)
            return Asking(opened)

        return cls(writer, examples, start)


def compare(
    writer: CacheWriter, engine: EngineName, opened: TeacherEngine, question: Question
) -> None:
    """Note how far an engine is from its model's definition, unless that was done or it is the
    definition; close it where that is too far."""
    noted = writer.definition
    wanted = question.capture.check == "always" if noted and not noted.done else noted is None
    if engine == "reference" or not wanted:
        return
    try:
        writer.note_definition(check_definition(opened, question))
    except BaseException:
        opened.close()
        raise


def fill(
    writer: CacheWriter,
    examples: Sequence[Example],
    start: OpenEngine,
    notes: "Notes",
    rank: int,
    world_size: int,
    on_progress: Callable[[CaptureProgress], None] | None = None,
) -> Manifest | None:
    """Answer one worker's missing shards of any cache, and seal it when none is missing."""
    if (sealed := manifest_of(writer)) is not None:
        return sealed
    missing = writer.missing(rank, world_size)
    if missing:
        totals = Totals.of(writer.plan, missing, rank)
        tell = on_progress or (lambda _: None)
        ShardWork(writer, examples, notes, totals, tell, start).score(missing)
    return None if writer.missing() else writer.seal()


class Notes:
    """The two files that a worker keeps beside the cache: finished shards and rejected examples."""

    def __init__(self, directory: Path, rank: int, on_error: OnError):
        self._shards = directory / f"capture.{rank}.jsonl"
        self._rejects = directory / "rejects.jsonl"
        self._on_error = on_error

    def shard(self, progress: CaptureProgress, receipt: ShardReceipt) -> None:
        """One line per finished shard."""
        line = {"shard": receipt.shard, "bytes": receipt.num_bytes, "tokens": receipt.num_tokens}
        _append(self._shards, line | progress.to_json())

    def reject(self, error: RejectedExample) -> None:
        """Stop, or write the example down and go on."""
        if self._on_error == "stop":
            raise error
        line = {"example_id": error.example.example_id, "source": error.example.source}
        _append(self._rejects, line | {"reason": error.found})


class ShardWork:
    """One worker's run over shards that are missing."""

    def __init__(
        self,
        writer: CacheWriter,
        examples: Sequence[Example],
        notes: Notes,
        totals: Totals,
        tell: Callable[[CaptureProgress], None],
        start: OpenEngine,
    ):
        self._writer, self._examples, self._notes = writer, examples, notes
        self._totals, self._tell, self._start = totals, tell, start

    def score(self, missing: list[int]) -> None:
        """Write every shard of `missing`; after one out-of-memory, with half the batch."""
        try:
            self._with_engine(missing, 1.0)
        except OutOfMemory:
            self._with_engine([n for n in missing if n in set(self._writer.missing())], 0.5)

    def _with_engine(self, missing: list[int], scale: float) -> None:
        self._say("starting the teacher")
        engine = self._start(scale)
        self._totals.start()
        try:
            self._writer.begin()
            first = self._fit(engine)
            self._say("scoring")
            self._write(engine, missing, first)
        finally:
            self._writer.release()
            engine.close()

    def _say(self, doing: str) -> None:
        self._totals.doing = doing
        self._tell(self._totals.progress())

    def _fit(self, engine: Engine) -> list[TeacherRecord]:
        """Codec tables follow from shard 0 alone, whichever worker comes first; its records."""
        if not self._writer.needs_fit:
            return []
        self._say("fitting the codec's tables on the first shard")
        examples = self._of(self._writer.plan.shard_range(0))
        first = list(engine.score(examples, self._notes.reject))
        self._writer.fit(first)
        return first

    def _write(self, engine: Engine, missing: list[int], first: list[TeacherRecord]) -> None:
        """Score ahead while the shard before is being encoded and committed.

        Args:
            first: shard 0, if its answers are at hand.
        """
        ahead, order = itertools.tee(self._writer.unclaimed(missing))
        shard_range = self._writer.plan.shard_range
        asked = (number for number in ahead if number or not first)  # shard 0 may be at hand
        wanted = (example for number in asked for example in self._of(shard_range(number)))
        answers = iter(engine.score(wanted, self._notes.reject))
        with ThreadPoolExecutor(1, "writer") as pool:  # encodes one shard while the next is scored
            before: Future[ShardReceipt] | None = None
            for number in order:
                found = answers if number or not first else iter(first)
                shard = list(self._watched(itertools.islice(found, len(shard_range(number)))))
                self._committed(before)
                before = pool.submit(self._writer.write, number, shard)
            self._committed(before)

    def _committed(self, pending: Future[ShardReceipt] | None) -> None:
        if pending is not None:
            receipt = pending.result()
            self._notes.shard(self._totals.after_shard(receipt), receipt)
            self._tell(self._totals.progress())

    def _watched(self, records: Iterator[TeacherRecord]) -> Iterator[TeacherRecord]:
        for record in records:
            self._totals.after_record(record)
            self._tell(self._totals.progress())
            yield record

    def _of(self, numbers: range) -> Iterator[Example]:
        return (self._examples[number] for number in numbers)


def manifest_of(writer: CacheWriter) -> Manifest | None:
    """The manifest of a cache that is finished; None before."""
    if writer.storage.size(layout.MANIFEST) is None:
        return None
    return TeacherCache.open(writer.storage.location).manifest


def _append(path: Path, line: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(line | {"time": round(time.time(), 3)}) + "\n")


__all__ = ["CaptureProgress", "Plan", "capture"]
