"""Item embeddings: every item of a catalogue once, into a cache of their own.

One idea: an item is a text and one token behind it, so the engines that keep hidden states of
ordinary examples give the state of its last token (DLLM2Rec) or all of them to average. Items are
keyed by their content, so the cache serves every set of interactions with that catalogue.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from stillroom.cache_schemas.errors import CacheError, CacheMissing, PlanMismatch
from stillroom.cache_schemas.manifest import Manifest, Plan
from stillroom.cache_schemas.signals import ITEM_PREFIX, hidden_name
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.cache.shard import dense_values
from stillroom.pipeline.cache.writer import CacheWriter
from stillroom.pipeline.capture.job import Notes, OnError, Task, compare, fill
from stillroom.pipeline.capture.plan import check_tokenizer, engine_facts
from stillroom.pipeline.capture.progress import CaptureProgress
from stillroom.pipeline.config import Capture, Run, require
from stillroom.pipeline.config.recommending import Items
from stillroom.pipeline.corpus.files import Corpus
from stillroom.pipeline.corpus.histories import open_items
from stillroom.pipeline.encoders.engine import NO_MASK, NO_TOKENS
from stillroom.pipeline.record import Example, TeacherRecord
from stillroom.pipeline.teacher.definition_check import Question
from stillroom.pipeline.teacher.facts import teacher_facts
from stillroom.pipeline.teacher.opening import open_engine
from stillroom.pipeline.teacher.protocol import EngineName, Reject, RejectedExample, stop

LEAST_CONTEXT = 128
"""Tokens that an engine is started for at least: its own first questions have to fit."""


def capture_items(
    run: Run,
    *,
    engine: EngineName = "vllm",
    rank: int = 0,
    world_size: int = 1,
    on_error: OnError = "stop",
    location: str = "",
    on_progress: Callable[[CaptureProgress], None] | None = None,
) -> Manifest | None:
    """Embed what is missing of a run's catalogue and seal it when nothing is.

    Args:
        run: needs [items], [teacher], and a corpus of interactions.
        engine, rank, world_size, on_error, on_progress: as for `capture.capture`.
        location: directory or URL of the cache; empty takes `<run.directory>/items`.

    Returns:
        The manifest, or None while other workers' shards are missing.

    Raises:
        PlanMismatch: the cache there has another plan, or the corpus another tokenizer.
        TeacherError: the teacher cannot be loaded or served.
        ConfigError: [candidates] asks for more items than there are.
    """
    task = open_task(run, engine, location)
    notes = Notes(run.path("item-notes"), rank, on_error)
    return fill(task.writer, task.examples, task.start, notes, rank, world_size, on_progress)


def open_task(run: Run, engine: EngineName, location: str = "") -> Task:
    """Plan the item embeddings of a run and open their cache; see `capture_items`."""
    table: Items = require(run.items, "items", run.directory)
    teacher = require(run.teacher, "teacher", run.directory)
    corpus = Corpus.open(run.path("corpus"))
    items = open_items(corpus)
    if run.candidates is not None:  # now, and not when all items are embedded
        run.candidates.check_fits(len(items))
    check_tokenizer(corpus, teacher)
    writer = CacheWriter.open(location or str(run.path("items")), make_plan(run, corpus, engine))
    lengths = [len(item.token_ids) for item in items]
    longest, asked = max(LEAST_CONTEXT, *lengths), _Asked(items, table)

    def start(scale: float) -> "ItemEngine":
        wanted = state_capture(table, table.check)
        opened = open_engine(engine, teacher, wanted, max_tokens=longest, batch_scale=scale)
        question = Question(teacher, wanted, asked, None, sum(lengths), "items")
        compare(writer, engine, opened, question)
        return ItemEngine(opened, table)

    return Task(writer, asked, start)


def make_plan(run: Run, corpus: Corpus, engine: EngineName) -> Plan:
    """The plan of a run's item embeddings."""
    table: Items = require(run.items, "items", run.directory)
    teacher = require(run.teacher, "teacher", run.directory)
    facts = teacher_facts(teacher, engine)
    catalogue = corpus.facts["catalogue"]
    step = table.step if table.codec == "step" else None
    shape = {"positions": 1, "width": facts["hidden_size"]}
    shape |= {"codec": {"name": table.codec, "step": step}}
    capture = {"profile": "portable", "k": 0, "catalogue": catalogue, "pooling": table.pooling}
    return Plan.make(
        teacher=facts,
        engine=engine_facts(engine),
        tokenizer=corpus.facts["tokenizer"],
        corpus={"digest": catalogue["digest"], "items": catalogue["items"]},
        capture=capture | {"examples_per_shard": table.items_per_shard},
        num_examples=catalogue["items"],
        max_tokens=1,
        signals={"rows": [], "dense": {item_name(table): shape}},
    )


def item_name(table: Items) -> str:
    """Signal of the embeddings."""
    return f"{ITEM_PREFIX}{table.layer}"


def state_capture(table: Items, check: str = "auto") -> Capture:
    """What an engine is asked for an item's states, and how it is checked."""
    rows = "answer" if table.pooling == "last" else "all"
    asked = {"k": 1, "entropy": False, "hidden_layers": (table.layer,), "hidden_rows": rows}
    return Capture.model_validate(asked | {"check": check})


def asked_about(example: Example, table: Items) -> Example:
    """A text as the engines must see it for `state_capture`."""
    if table.pooling == "last":
        return example
    return replace(example, loss_mask=np.arange(len(example.token_ids)) > 0)


def pooled(record: TeacherRecord, table: Items) -> np.ndarray:
    """float32 [1, width]: the embedding of a text that `asked_about` was made from; [0, width]
    where it has no answer."""
    states = record.signals[hidden_name(table.layer)]
    if table.pooling == "last" or not len(states):
        return states[-1:]
    return states.mean(axis=0, keepdims=True, dtype=np.float64).astype(np.float32)


def bare(example: Example) -> Example:
    """An example without its tokens, as caches about items and histories keep it."""
    return replace(example, token_ids=NO_TOKENS, loss_mask=NO_MASK, images=())


class ItemEngine:
    """An engine over items; see `stillroom.pipeline.teacher.protocol.Engine`."""

    def __init__(self, engine: Any, table: Items):
        self._engine, self._table = engine, table
        self.close = engine.close

    def score(self, examples: Iterable[Example], reject: Reject = stop) -> Iterator[TeacherRecord]:
        """One record per item, in the order given."""
        for record in self._engine.score(examples, reject):
            vector = pooled(record, self._table)
            if not np.isfinite(vector).all():
                reject(RejectedExample(record.example, "NaN or infinite hidden states"))
                vector = vector[:0]
            yield TeacherRecord(bare(record.example), 0, {item_name(self._table): vector})


class _Asked(Sequence[Example]):
    """Items as an engine is asked about them, made when they are wanted."""

    def __init__(self, items: Sequence[Example], table: Items):
        self._items, self._table = items, table

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _Asked(self._items[index], self._table)
        return asked_about(self._items[index], self._table)


def read_items(cache: TeacherCache) -> np.ndarray:
    """float32 [N, width]: every embedding of an item cache, in the catalogue's order.

    Raises:
        CacheError: the cache holds no item embeddings, or an item has none.
    """
    names = [name for name in cache.form.dense if name.startswith(ITEM_PREFIX)]
    if len(names) != 1:
        raise CacheError("holds no item embeddings", where=cache.storage.location)
    shards = range(cache.plan.num_shards)
    found = [v for s in shards for v in dense_values(cache.storage, cache.form, s, names[0])]
    lacking = sum(len(vector) != 1 for vector in found)
    if lacking:
        raise CacheError(
            f"{lacking} of {len(found)} items have no embedding",
            where=cache.storage.location,
            remedy="Look at item-notes/rejects.jsonl, mend those items, and capture again.",
        )
    return np.concatenate(found).astype(np.float32, copy=False)


def open_items_of(run: Run, corpus: Corpus, engine: EngineName) -> TeacherCache:
    """The sealed item cache that a run's candidates are taken from.

    Raises:
        CacheMissing: there is none.
        CacheIncomplete: it is not sealed.
        PlanMismatch: it was made from something else.
    """
    try:
        cache = TeacherCache.open(run.path("items"))
    except CacheMissing as error:
        remedy = "Capture [items] of this run first: the candidates are taken from them."
        raise CacheMissing(error.found, where=error.where, remedy=remedy) from None
    differences = make_plan(run, corpus, engine).differences(cache.plan)
    if differences:
        raise PlanMismatch(
            "these item embeddings are of another plan: " + "; ".join(differences),
            where=cache.storage.location,
            remedy="Capture the items again in another run directory.",
        )
    return cache
