"""Random reads of a cache: does the number of shards matter, and what does one sample cost?

One idea: the same encoded examples are written into two caches, of few and of many shards, and read
in one random order, in turns, so that both meet the same machine.
"""

import tempfile
import time
from pathlib import Path

import numpy as np

from stillroom.cache_schemas.manifest import Plan
from stillroom.cache_schemas.record_codec import RowCodec
from stillroom.pipeline.cache.formats import Encoded, Format
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.cache.storage.directory import DirectoryStorage
from stillroom.pipeline.cache.storage.disk import Disk
from stillroom.pipeline.cache.writer import CacheWriter
from stillroom.pipeline.record import Example, TeacherRecord, content_id

READS = 400


class Unsynced(Disk):
    """Writes without syncing: what is measured is reading."""

    def write(self, path: Path, data: bytes) -> None:
        """Write a new file."""
        with open(path, "xb") as file:
            file.write(data)

    def sync(self, path: Path) -> None:
        """Nothing."""


class CountingStorage(DirectoryStorage):
    """A directory that counts reads: each would be one request to a bucket."""

    reads = 0

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Read, and count."""
        self.reads += 1
        return super().read(name, start, length)


def measure(codec: RowCodec, rows: list[dict[str, np.ndarray]], num_examples: int) -> dict:
    """Milliseconds of CPU per random example for 8 and for `num_examples` shards, and requests.

    Args:
        codec: fitted.
        rows: signals of a few examples, used over and over.
        num_examples: size of both caches.
    """
    with tempfile.TemporaryDirectory() as folder:
        caches = {
            shards: _written(Path(folder, str(shards)), codec, rows, num_examples, shards)
            for shards in (8, num_examples)
        }
        order = np.random.default_rng(0).integers(0, num_examples, READS)
        best = {shards: np.full(READS, np.inf) for shards in caches}
        for _ in range(3):
            for at, number in enumerate(order):
                for shards, cache in caches.items():
                    started = time.process_time_ns()
                    cache.read(int(number))
                    spent = (time.process_time_ns() - started) / 1e6
                    best[shards][at] = min(best[shards][at], spent)
        return {
            "examples": num_examples,
            "cpu_ms_per_sample": {shards: float(times.mean()) for shards, times in best.items()},
            "many_shards_over_few": float(best[num_examples].mean() / best[8].mean()),
            "requests_per_sample": _requests(Path(folder, "8"), order),
        }


def _requests(root: Path, order: np.ndarray) -> float:
    """Reads per sample once every shard was met: what a long training run pays."""
    storage = CountingStorage(root)
    cache = TeacherCache.open(storage)
    for number in range(0, len(cache), cache.plan.examples_per_shard):
        cache.read(number)
    storage.reads = 0
    for number in order:
        cache.read(int(number))
    return storage.reads / len(order)


def _written(
    root: Path, codec: RowCodec, rows: list[dict[str, np.ndarray]], num_examples: int, shards: int
) -> TeacherCache:
    plan = _plan(codec, num_examples, num_examples // shards)
    writer = CacheWriter.open(DirectoryStorage(root, Unsynced()), plan)
    writer.use_codec(codec)
    form = Format(plan, codec)
    encoded = [form.encode(_record(signals)) for signals in rows]
    for shard in writer.missing():
        part = (_renamed(encoded[n % len(encoded)], n) for n in plan.shard_range(shard))
        writer.write_encoded(shard, part)
    writer.seal()
    return TeacherCache.open(root)


def _plan(codec: RowCodec, num_examples: int, per_shard: int) -> Plan:
    capture = {
        "k": codec.k,
        "tail_draws": 0,
        "temperatures": [1.0],
        "entropy": True,
        "moments": False,
        "hidden_layers": [],
        "hidden_codec": "step",
        "hidden_step": 0.05,
        "profile": codec.profile,
        "examples_per_shard": per_shard,
        "seed": 0,
    }
    return Plan.make(
        teacher={"vocab_size": codec.vocab_size, "hidden_size": 8, "weights_sha256": "0" * 64},
        engine={"name": "benchmark", "version": "1"},
        tokenizer={"sha256": "1" * 64},
        corpus={"digest": "2" * 64, "split": "train"},
        capture=capture,
        num_examples=num_examples,
        max_tokens=1025,
        images=False,
    )


def _record(signals: dict[str, np.ndarray]) -> TeacherRecord:
    tokens = signals["token_ids"]
    mask = np.arange(len(tokens)) > 0
    example = Example(content_id(tokens, mask), "0" * 32, "benchmark", tokens, mask)
    return TeacherRecord(example, 0, {n: a for n, a in signals.items() if n != "token_ids"})


def _renamed(encoded: Encoded, number: int) -> Encoded:
    """The same rows as another example."""
    return Encoded(encoded.values | {"example_id": f"{number:032x}"}, encoded.chunks)
