"""Opening a cache of 100 billion tokens, and resuming one: requests, seconds, memory.

    python -m benchmarks.cache_scale --json

40,000 shards of 2,442 examples of 1,024 tokens, about 10 TB. Manifest and receipts are made up,
the records are not there. Each measurement runs in a process of its own, so peak memory is its own.
"""

import multiprocessing
import resource
import time
from pathlib import Path

import numpy as np

from benchmarks.cache_trial import asking, publish
from stillroom.cache_schemas import layout
from stillroom.cache_schemas.manifest import Manifest, Plan, Records, ShardReceipt, ShardTable
from stillroom.pipeline.cache.formats import UNFITTED, Format, RowCodec, codec_sizes
from stillroom.pipeline.cache.shard import file_entry
from tests.synthetic_records import make_plan

EXAMPLES, TOKENS, BYTES_PER_TOKEN = 2442, 1024, 100


class Simulated:
    """A storage whose listings and receipts follow from numbers; counts every request."""

    location = "simulated"

    def __init__(self, plan: Plan):
        self.plan, self.requests = plan, 0
        self.form = Format(plan, RowCodec("exact", **codec_sizes(plan)))
        assert plan.facts["capture"]["profile"] in UNFITTED
        self.manifest = self._manifest()

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """The manifest or a receipt."""
        self.requests += 1
        if name == layout.MANIFEST:
            return self.manifest
        if name.startswith("receipts/"):
            return receipt(self.form, int(Path(name).stem)).to_bytes()
        raise FileNotFoundError(name)

    def size(self, name: str) -> int | None:
        """Only the manifest is there."""
        self.requests += 1
        return len(self.manifest) if name == layout.MANIFEST else None

    def list(self, folder: str) -> dict[str, int]:
        """A full folder; every tenth receipt is missing."""
        self.requests += 1
        kind, number = folder.split("/")
        first = int(number) * layout.SHARDS_PER_FOLDER
        name = {"rows": layout.rows, "receipts": layout.receipt}[kind]
        skip = 10 if kind == "receipts" else 1 << 60
        shards = range(first, min(first + layout.SHARDS_PER_FOLDER, self.plan.num_shards))
        return {name(shard): 1 for shard in shards if shard % skip != skip - 1}

    def _manifest(self) -> bytes:
        shards = self.plan.num_shards
        tokens = EXAMPLES * TOKENS
        table = ShardTable(
            num_tokens=[tokens] * shards,
            num_rows=[tokens - EXAMPLES] * shards,
            bytes=[tokens * BYTES_PER_TOKEN] * shards,
            receipt=[f"{shard:064x}" for shard in range(shards)],
        )
        files = {layout.index(number): file_entry(b"") for number in range(-(-shards // 1000))}
        return Manifest(
            plan=self.plan.facts, codec=self.form.codec_body, files=files, shards=table
        ).to_bytes()


def receipt(form: Format, shard: int) -> ShardReceipt:
    """A receipt of made-up records."""
    size = TOKENS * BYTES_PER_TOKEN
    one = [0] * EXAMPLES
    return ShardReceipt(
        plan=form.plan.digest,
        codec=form.codec_digest,
        shard=shard,
        files={layout.rows(shard): file_entry(b"")},
        records=Records(
            offset=[i * size for i in range(EXAMPLES)],
            bytes=[size] * EXAMPLES,
            xxh3=[f"{i:016x}" for i in range(EXAMPLES)],
            example_id=[f"{i:032x}" for i in range(EXAMPLES)],
            source=["web"] * EXAMPLES,
            num_tokens=[TOKENS] * EXAMPLES,
            num_rows=[TOKENS - 1] * EXAMPLES,
            entropy=[2.5 for _ in one],
            tail=[0.1 for _ in one],
            preview=["The beginning of some text, " * 4] * EXAMPLES,
        ),
    )


def opening(storage: Simulated) -> dict:
    """Open for training."""
    from stillroom.pipeline.cache.reader import TeacherCache

    cache = TeacherCache.open(storage)
    return {"examples": len(cache), "tokens": cache.manifest.num_tokens}


def resuming(storage: Simulated) -> dict:
    """What one of 64 workers has left to do."""
    from stillroom.pipeline.cache.writer import CacheWriter

    return {"missing": len(CacheWriter(storage, storage.plan, None).missing(7, 64))}


def measured(work) -> dict:
    """Run in a forked child: requests, seconds, and memory above what it started with."""
    plan = make_plan(EXAMPLES * 40_000, EXAMPLES, TOKENS)
    storage = Simulated(plan)
    queue = multiprocessing.get_context("fork").Queue()
    child = multiprocessing.get_context("fork").Process(target=_child, args=(work, storage, queue))
    child.start()
    result = queue.get()
    child.join()
    return result


def _child(work, storage: Simulated, queue) -> None:
    before = _resident()
    started = time.perf_counter()
    answer = work(storage)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    queue.put(
        {
            **answer,
            "requests": storage.requests,
            "seconds": round(seconds, 3),
            "megabytes": round(peak - before, 1),
            "process_megabytes": round(peak, 1),
        }
    )


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    """Measure and print."""
    parser = asking(__doc__)
    options = parser.parse_args()
    sizes = [len(receipt(Simulated(make_plan(EXAMPLES, EXAMPLES, TOKENS)).form, 0).to_bytes())]
    manifest = Simulated(make_plan(EXAMPLES * 40_000, EXAMPLES, TOKENS)).manifest
    result = {
        "shards": 40_000,
        "manifest_bytes": len(manifest),
        "receipt_bytes": int(np.mean(sizes)),
        "open": measured(opening),
        "resume": measured(resuming),
    }
    publish("cache_scale", result, options.json)


if __name__ == "__main__":
    main()
