"""Open, read at random, verify and pull: a cache of many short examples, and one of many shards.

    python -m benchmarks.cache_verify --json [--kept DIRECTORY]

One idea: each example is one of a few hundred synthetic ones behind a prompt that spells its
number, so that all differ and none costs more to make than to encode. 100,000 examples of 2 to 24
rows of 12 ids, 12 draws and every scalar, in 200 shards; and 16,000 in 2,000 shards. Times are by
the clock and of processors, which other work on the machine lengthens little; of one process and of
one for each CPU, on files that the machine has in memory.
"""

import argparse
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import needs
from benchmarks.cache_reads import Unsynced
from benchmarks.cache_trial import asking, publish
from stillroom.cache_schemas.manifest import Plan
from stillroom.pipeline.cache.care.verification import verify
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.cache.sharing.copying import copy
from stillroom.pipeline.cache.storage.directory import DirectoryStorage
from stillroom.pipeline.cache.writer import CacheWriter
from stillroom.pipeline.record import TeacherRecord, content_id
from tests.synthetic_records import VOCAB, make_plan, make_record

DISTINCT, READS, SEED = 300, 2000, 0
SIZES = {"short": (100_000, 500), "shards": (16_000, 8)}
"""Examples, and examples of a shard."""


def plan_of(name: str) -> Plan:
    """Plan of one of the two caches."""
    examples, per_shard = SIZES[name]
    return make_plan(examples, per_shard, profile="small", k=12, tail_draws=12, moments=True)


def records(plan: Plan, numbers: range) -> Iterator[TeacherRecord]:
    """Examples that differ in their first three tokens."""
    made = [make_record(plan, number) for number in range(DISTINCT)]
    for number in numbers:
        known = made[number % DISTINCT]
        digits = [number // VOCAB**place % VOCAB for place in range(3)]
        tokens = np.concatenate([np.array(digits, np.int32), known.example.token_ids])
        mask = np.concatenate([np.zeros(3, bool), known.example.loss_mask])
        own = replace(
            known.example, example_id=content_id(tokens, mask), token_ids=tokens, loss_mask=mask
        )
        yield replace(known, example=own, first_row=known.first_row + 3)


def written(root: Path, plan: Plan) -> Path:
    """The sealed cache, made unless it is there."""
    writer = CacheWriter.open(DirectoryStorage(root, Unsynced()), plan)
    if writer.needs_fit:
        writer.fit(records(plan, range(DISTINCT)))
    for shard in writer.missing():
        writer.write(shard, records(plan, plan.shard_range(shard)))
    writer.seal()
    return root


def processor() -> float:
    """Seconds of processor time of this process and of its children that have ended."""
    own, ended = (resource.getrusage(of) for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime


def spent(work, *arguments, **options) -> tuple[dict[str, float], Any]:
    """Seconds that one call takes, by the clock and of processors, and what it gives."""
    started, before = time.perf_counter(), processor()
    found = work(*arguments, **options)
    used, clock = processor() - before, time.perf_counter() - started
    return {"clock": round(clock, 4), "processor": round(used, 4)}, found


def checked(root: Path, **options) -> dict:
    """Seconds to verify, and examples per second of one processor."""
    seconds, report = spent(verify, DirectoryStorage(root), **options)
    assert not report.problems, report.problems[:3]
    rate = report.num_examples / seconds["processor"]
    return {"seconds": seconds, "examples_per_processor_second": round(rate)}


def measured(root: Path) -> dict:
    """All four, of one cache."""
    cache = TeacherCache.open(root)
    order = np.random.default_rng(SEED).integers(0, len(cache), READS).tolist()
    reading, _ = spent(lambda: [cache.read(number) for number in order])
    with tempfile.TemporaryDirectory(dir=root.parent) as folder:
        target = DirectoryStorage(Path(folder, "copy"), Unsynced())
        pulled, _ = spent(copy, DirectoryStorage(root), target, threads=1)
    opened = [spent(TeacherCache.open, root)[0] for _ in range(5)]
    found = {
        "examples": len(cache),
        "shards": cache.plan.num_shards,
        "bytes": cache.manifest.num_bytes,
        "open_seconds": min(opened, key=lambda each: each["processor"]),
        "read_milliseconds": {name: round(1e3 * s / READS, 3) for name, s in reading.items()},
        "pull_seconds": pulled,
        "verify": checked(root),
    }
    if workers_are_known():
        found["verify_all_cores"] = checked(root, workers=os.cpu_count())
    return found


def workers_are_known() -> bool:
    """Earlier releases verify in one process."""
    return "workers" in verify.__annotations__


def main() -> None:
    """Measure and print."""
    parser = asking(__doc__)
    parser.add_argument("--kept", type=Path, help="caches are made here and stay")
    options: argparse.Namespace = parser.parse_args()
    folder = options.kept or Path(tempfile.mkdtemp(dir="/dev/shm"))
    roots = {name: written(folder / name, plan_of(name)) for name in SIZES}
    result: dict = {name: measured(root) for name, root in roots.items()}
    result["peak_megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    if not options.kept:
        shutil.rmtree(folder)
    publish("cache_verify", result, options.json)


if __name__ == "__main__":
    needs.run(main)
