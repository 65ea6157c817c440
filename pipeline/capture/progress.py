"""How far a capture has come, in numbers.

One idea: a worker adds up what it has seen and hands out immutable snapshots; whoever draws, logs
or sums over workers gets the same value.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from stillroom.cache_schemas.manifest import Plan, ShardReceipt
from stillroom.pipeline.record import TeacherRecord


@dataclass(frozen=True, slots=True)
class CaptureProgress:
    """One worker's progress since it was started.

    Attributes:
        rank: the worker.
        shards, total_shards: committed, and all of this worker's share that were missing.
        examples, total_examples: scored, and to score.
        tokens: tokens of the scored examples.
        rows: scored rows.
        bytes: of committed shards.
        committed_tokens: tokens of committed shards.
        seconds: since the first example was asked for.
        retained_mass: mean probability inside the stored top-k, so far.
        entropy: mean entropy in nats, so far; NaN where it is not kept.
        doing: what the worker is at, in words.
        committed_examples: examples of committed shards.
    """

    rank: int
    shards: int
    total_shards: int
    examples: int
    total_examples: int
    tokens: int
    rows: int
    bytes: int
    committed_tokens: int
    seconds: float
    retained_mass: float
    entropy: float
    doing: str = ""
    committed_examples: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Rate since the start."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def bytes_per_token(self) -> float:
        """Stored bytes for each token of the committed shards; 0 before the first."""
        return self.bytes / self.committed_tokens if self.committed_tokens else 0.0

    @property
    def seconds_left(self) -> float:
        """Estimate from the examples done so far; NaN before the first."""
        if not self.examples:
            return float("nan")
        return self.seconds * (self.total_examples - self.examples) / self.examples

    def to_json(self) -> dict:
        """Everything, with the rates, for a log; NaN becomes null."""
        names = ("tokens_per_second", "bytes_per_token", "seconds_left")
        numbers = asdict(self) | {name: getattr(self, name) for name in names}
        del numbers["doing"]
        return {"progress": {name: _json(value) for name, value in numbers.items()}}


@dataclass
class Totals:
    """The sums behind a `CaptureProgress`."""

    rank: int
    total_shards: int
    total_examples: int
    shards: int = 0
    examples: int = 0
    tokens: int = 0
    rows: int = 0
    bytes: int = 0
    committed_tokens: int = 0
    committed_examples: int = 0
    mass: float = 0.0
    entropy: float = 0.0
    doing: str = ""
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, plan: Plan, missing: Sequence[int], rank: int) -> "Totals":
        """At the start of a worker's share."""
        return cls(rank, len(missing), sum(len(plan.shard_range(number)) for number in missing))

    def start(self) -> None:
        """The engine is ready: time counts from here."""
        self.started = time.monotonic()

    def after_record(self, record: TeacherRecord) -> None:
        """Count one scored example."""
        self.examples += 1
        self.tokens += len(record.example.token_ids)
        self.rows += record.num_rows
        if "tail_logprob" in record.signals:
            tail = record.signals["tail_logprob"].astype(np.float64)
            self.mass += float(np.sum(-np.expm1(tail)))  # 1 - tail mass, not cancelled
        if "entropy" in record.signals:
            self.entropy += float(np.sum(record.signals["entropy"], dtype=np.float64))
        else:
            self.entropy = float("nan")

    def after_shard(self, receipt: ShardReceipt) -> CaptureProgress:
        """Count one committed shard."""
        self.shards += 1
        self.bytes += receipt.num_bytes
        self.committed_tokens += receipt.num_tokens
        self.committed_examples += receipt.num_examples
        return self.progress()

    def progress(self) -> CaptureProgress:
        """A snapshot."""
        rows = max(self.rows, 1)
        return CaptureProgress(
            rank=self.rank,
            shards=self.shards,
            total_shards=self.total_shards,
            examples=self.examples,
            total_examples=self.total_examples,
            tokens=self.tokens,
            rows=self.rows,
            bytes=self.bytes,
            committed_tokens=self.committed_tokens,
            seconds=time.monotonic() - self.started,
            retained_mass=self.mass / rows,
            entropy=self.entropy / rows,
            doing=self.doing,
            committed_examples=self.committed_examples,
        )


def _json(value: float) -> float | None:
    return None if value != value else round(value, 6)
