"""Caches of real answers for tests of what reads caches: the reference engine, on disk or not.

One idea: the records and the plan are the real ones; `MemoryCache` only leaves the disk and its
rounding out, `write` puts the same records into a real cache.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from stillroom.cache_schemas.manifest import Plan
from stillroom.pipeline.config import Capture, Teacher
from stillroom.pipeline.corpus.tokenizer import tokenizer_facts
from stillroom.pipeline.record import Example, TeacherRecord, content_id
from stillroom.pipeline.teacher.facts import teacher_facts
from stillroom.pipeline.teacher.reference.engine import ReferenceEngine
from stillroom.pipeline.teacher.rows import kept_temperatures


@dataclass(frozen=True)
class MemoryCache:
    """Records behind the reader's interface."""

    records: tuple[TeacherRecord, ...]
    plan: Plan

    @property
    def signals(self) -> tuple[str, ...]:
        return tuple(self.records[0].signals)

    @property
    def temperatures(self) -> tuple[float, ...]:
        return tuple(self.plan.facts["capture"]["temperatures"])

    def index(self, columns=None) -> pa.Table:
        return pa.table(
            {
                "example_id": [r.example.example_id for r in self.records],
                "source": [r.example.source for r in self.records],
                "num_tokens": [len(r.example.token_ids) for r in self.records],
            }
        )

    def __len__(self) -> int:
        return len(self.records)

    def shard_of(self, i: int) -> int:
        return i // self.plan.examples_per_shard

    def read(self, i: int, signals=None) -> TeacherRecord:
        record = self.records[i]
        if signals is None:
            return record
        return replace(record, signals={name: record.signals[name] for name in signals})

    def write(self, directory: Path) -> Path:
        """Put the records into a sealed cache on disk."""
        from stillroom.pipeline.cache.writer import CacheWriter

        writer = CacheWriter.open(directory, self.plan)
        for shard in writer.missing():
            writer.write(shard, [self.records[i] for i in self.plan.shard_range(shard)])
        writer.seal()
        return directory


def examples(count: int, seed: int = 0, longest: int = 24, vocab_size: int = 768) -> list[Example]:
    """Random token sequences of 6 to `longest` tokens; the first third is outside the loss mask."""
    random = np.random.default_rng(seed)
    found = []
    for number in range(count):
        tokens = random.integers(4, vocab_size, random.integers(6, longest + 1)).astype(np.int32)
        mask = np.arange(len(tokens)) >= len(tokens) // 3
        name = content_id(tokens, mask)
        found.append(Example(name, f"document {number}", "random", tokens, mask))
    return found


def captured(model, texts: list[Example], **settings) -> MemoryCache:
    """Score examples with the reference engine in fp32; `settings` are keys of [capture]."""
    capture = Capture(**{"k": 16, "profile": "exact", "examples_per_shard": 4} | settings)
    teacher = Teacher(model=str(model), dtype="float32")
    engine = ReferenceEngine(teacher, capture)
    kept = {"temperatures": kept_temperatures(capture)}
    plan = Plan.make(
        teacher=teacher_facts(teacher),
        engine={"name": "reference"},
        tokenizer=tokenizer_facts(str(model)),
        corpus={"digest": "0" * 64},
        capture=capture.model_dump(mode="json") | kept,
        num_examples=len(texts),
        max_tokens=max(len(text.token_ids) for text in texts),
    )
    return MemoryCache(tuple(engine.score(texts)), plan)
