"""Caches made in memory by the reference engine, for tests of what reads caches.

One idea: the records are the real engine's, only the disk is left out.
"""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from pipeline.config import Capture, Teacher
from pipeline.corpus_tokenizer import tokenizer_facts
from pipeline.record import Example, TeacherRecord, content_id
from pipeline.teacher.facts import teacher_facts
from pipeline.teacher.reference import ReferenceEngine
from pipeline.teacher.rows import kept_temperatures


@dataclass(frozen=True)
class MemoryPlan:
    """The parts of a plan that training looks at."""

    facts: dict
    digest: str


@dataclass(frozen=True)
class MemoryCache:
    """Records behind the reader's interface."""

    records: tuple[TeacherRecord, ...]
    plan: MemoryPlan
    temperatures: tuple[float, ...] = (1.0,)
    examples_per_shard: int = 4

    @property
    def signals(self) -> tuple[str, ...]:
        return tuple(self.records[0].signals)

    def index(self, columns=None) -> pa.Table:
        return pa.table(
            {
                "example_id": [r.example.example_id for r in self.records],
                "num_tokens": [len(r.example.token_ids) for r in self.records],
            }
        )

    def __len__(self) -> int:
        return len(self.records)

    def shard_of(self, i: int) -> int:
        return i // self.examples_per_shard

    def read(self, i: int, signals=None) -> TeacherRecord:
        record = self.records[i]
        if signals is None:
            return record
        return replace(record, signals={name: record.signals[name] for name in signals})


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


def capture_in_memory(model, capture: Capture, texts: list[Example]) -> MemoryCache:
    """Score examples with the reference engine in fp32."""
    teacher = Teacher(model=str(model), dtype="float32")
    engine = ReferenceEngine(teacher, capture)
    facts = {"teacher": teacher_facts(teacher), "tokenizer": tokenizer_facts(str(model))}
    plan = MemoryPlan(facts, digest=f"memory of {len(texts)} {capture.model_dump_json()}")
    return MemoryCache(tuple(engine.score(texts)), plan, kept_temperatures(capture))
