"""What a capture will cost, from a sample of its examples.

One idea: do the real thing on a few examples spread over the corpus, into a cache that is thrown
away, and scale up. The estimate leaves out the engine's start.
"""

import tempfile
import time
from dataclasses import dataclass

from stillroom.pipeline.cache.writer import CacheWriter
from stillroom.pipeline.capture.plan import check_tokenizer, longest, make_plan, pictures_of
from stillroom.pipeline.config import Run, require
from stillroom.pipeline.corpus.preparing import Corpus
from stillroom.pipeline.shares import evenly
from stillroom.pipeline.teacher.opening import open_engine
from stillroom.pipeline.teacher.protocol import EngineName, TeacherEngine

SAMPLE = 16


@dataclass(frozen=True, slots=True)
class Cost:
    """An estimate.

    Attributes:
        sampled: examples it was made from.
        examples, tokens: of the whole split.
        tokens_per_second: of one engine on this machine.
        bytes_per_token: in the cache.
    """

    sampled: int
    examples: int
    tokens: int
    tokens_per_second: float
    bytes_per_token: float

    @property
    def hours(self) -> float:
        """On one engine."""
        return self.tokens / self.tokens_per_second / 3600

    @property
    def gigabytes(self) -> float:
        """Of the whole cache, in 10^9 bytes."""
        return self.tokens * self.bytes_per_token / 1e9


def estimate(run: Run, *, engine: EngineName = "vllm", split: str = "train") -> Cost:
    """Score a sample of a run's corpus; leaves nothing behind.

    Raises:
        StillroomError: whatever the capture itself would raise.
    """
    teacher = require(run.teacher, "teacher", run.directory)
    table = require(run.capture, "capture", run.directory)
    corpus = Corpus.open(run.path("corpus"))
    check_tokenizer(corpus, teacher)
    examples = corpus.split(split)
    sample = [examples[number] for number in evenly(len(examples), SAMPLE)]
    started = open_engine(
        engine, teacher, table, max_tokens=longest(corpus), pictures=pictures_of(corpus)
    )
    try:
        seconds, records = _timed(started, sample)
    finally:
        started.close()
    tokens = sum(len(example.token_ids) for example in sample)
    one_shard = table.model_copy(update={"examples_per_shard": len(sample)})
    plan = make_plan(corpus, split, teacher, one_shard, engine, num_examples=len(sample))
    with tempfile.TemporaryDirectory() as scratch:
        receipt = CacheWriter.open(scratch, plan).write(0, records)
    return Cost(
        sampled=len(sample),
        examples=len(examples),
        tokens=corpus.facts["counts"][split]["tokens"],
        tokens_per_second=tokens / seconds,
        bytes_per_token=receipt.num_bytes / tokens,
    )


def _timed(engine: TeacherEngine, sample: list) -> tuple[float, list]:
    """Seconds for the sample, after one example that warms up, and its records."""
    list(engine.score(sample[:1]))
    start = time.monotonic()
    records = list(engine.score(sample))
    return time.monotonic() - start, records
