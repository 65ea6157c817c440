"""Reading a cache larger than memory: the whole of it, shards in random order, every checksum.

    python -m benchmarks.cache_stream --gigabytes 8 --memory 2 --json

Makes a cache of the size asked for (64 distinct records, repeated), then reads it once in a child
whose address space is limited (RLIMIT_AS, which is stricter than a limit of resident memory).
"""

import argparse
import itertools
import multiprocessing
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.cache_trial import publish
from cache_schemas.manifest import Plan
from pipeline.cache.writer import CacheWriter
from pipeline.record import Example, TeacherRecord

VOCAB, K, TOKENS, PER_SHARD, DISTINCT = 49_152, 64, 1024, 512, 64


def make_record(number: int) -> TeacherRecord:
    """A record whose lists look like a language model's: skewed ids, falling log-probabilities."""
    rng = np.random.default_rng(number)
    rows = TOKENS - 1
    ids = np.sort(_distinct_ids(rng, rows), axis=1)
    gaps = rng.gamma(0.4, 0.5, size=(rows, K)).astype(np.float32)
    logits = -np.cumsum(gaps, axis=1)
    tail = rng.uniform(0.01, 0.3, rows)
    lse = np.log(np.exp(logits).sum(axis=1) / (1 - tail))
    logprobs = (logits - lse[:, None]).astype(np.float32)
    tokens = rng.integers(0, VOCAB, TOKENS).astype(np.int32)
    example = Example(f"{number:032x}", str(number), "made", tokens, np.ones(TOKENS, dtype=bool))
    signals = {
        "topk_ids": ids,
        "topk_logprobs": logprobs,
        "tail_logprob": np.log(tail).astype(np.float32),
        "token_logprob": logprobs[:, 0],
        "token_rank": np.ones(rows, dtype=np.int32),
        "lse": lse[:, None].astype(np.float32),
        "entropy": np.full(rows, 2.5, dtype=np.float32),
    }
    return TeacherRecord(example, 0, signals)


def _distinct_ids(rng: np.random.Generator, rows: int) -> np.ndarray:
    """int32 [rows, K], without repetition in a row, small ids more often."""
    drawn = (VOCAB * rng.random((rows, 4 * K)) ** 4).astype(np.int32)
    return np.stack([np.unique(row)[:K] for row in drawn])


def make_cache(root: Path, gigabytes: float) -> CacheWriter:
    """Write and seal a cache of about this size."""
    records = [make_record(number) for number in range(DISTINCT)]
    probe = _plan(1)
    with tempfile.TemporaryDirectory() as folder:
        writer = CacheWriter.open(folder, probe)
        writer.fit(records[:16])
        codec = writer.fitted().codec
        encoded = [writer.fitted().encode(record) for record in records]
    size = np.mean([len(example.values["record"]) for example in encoded])
    plan = _plan(int(gigabytes * 1e9 / size))
    writer = CacheWriter.open(root, plan)
    writer.use_codec(codec)
    for shard in writer.missing():
        count = len(plan.shard_range(shard))
        writer.write_encoded(shard, itertools.islice(itertools.cycle(encoded), count))
    writer.seal()
    return writer


def _plan(num_examples: int) -> Plan:
    capture = {"k": K, "tail_draws": 0, "temperatures": [1.0], "entropy": True}
    return Plan.make(
        teacher={"vocab_size": VOCAB},
        engine={},
        tokenizer={},
        corpus={"digest": "made"},
        capture=capture | {"profile": "small", "examples_per_shard": PER_SHARD},
        num_examples=num_examples,
        max_tokens=TOKENS,
    )


def read_all(root: str, gigabytes: float, queue) -> None:
    """Read every record in a limited address space, shards shuffled, as training does."""
    limit = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    from pipeline.cache.reader import TeacherCache

    cache = TeacherCache.open(root)
    started, tokens = time.perf_counter(), 0
    shards = np.random.default_rng(0).permutation(cache.plan.num_shards)
    for shard in shards:
        numbers = np.random.default_rng(shard).permutation(cache.plan.shard_range(int(shard)))
        for number in numbers:
            record = cache.read(int(number), ("topk_ids", "topk_logprobs", "tail_logprob"))
            tokens += len(record.example.token_ids)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    queue.put({"tokens": tokens, "seconds": round(seconds, 1), "peak_megabytes": round(peak)})


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--memory", type=float, default=2.0, help="GiB of address space")
    parser.add_argument("--folder", default="", help="where the cache goes; removed afterwards")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(dir=options.folder or None)) / "cache"
    started = time.perf_counter()
    try:
        writer = make_cache(root, options.gigabytes)
        written = time.perf_counter() - started
        size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
        spawn = multiprocessing.get_context("spawn")
        queue = spawn.Queue()
        child = spawn.Process(target=read_all, args=(str(root), options.memory, queue))
        child.start()
        answer = queue.get()
        child.join()
    finally:
        shutil.rmtree(root.parent)
    result = {
        "cache_bytes": size,
        "shards": writer.plan.num_shards,
        "examples": writer.plan.num_examples,
        "memory_limit_gib": options.memory,
        "write_seconds": round(written, 1),
        **answer,
        "tokens_per_second": round(answer["tokens"] / answer["seconds"]),
        "bytes_per_token": round(size / answer["tokens"], 1),
    }
    publish("cache_stream", result, options.json)


if __name__ == "__main__":
    main()
