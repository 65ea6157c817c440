"""A cache larger than memory: the whole of it read, or a student trained on the whole of it.

    python -m benchmarks.cache_stream --gigabytes 8 --memory 2 --json
    python -m benchmarks.cache_stream --gigabytes 8 --memory 2 --train --json

Makes a cache of the size asked for (64 distinct records, repeated), then goes through it once,
shards in random order, every checksum verified, in a child whose address space is limited
(RLIMIT_AS, which is stricter than a limit of resident memory). Reading is of profile `small`,
k = 64. Training is the trainer with a tiny student, from profile `portable` with k = 512:
four kilobytes a token, so that a CPU gets through in minutes. With `--cache` the cache stays, and a
run that was stopped goes on.
"""

import contextlib
import itertools
import multiprocessing
import resource
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from queue import Empty

import numpy as np

from benchmarks.cache_trial import asking, publish
from stillroom.cache_schemas.manifest import Plan
from stillroom.pipeline.cache.formats import Encoded
from stillroom.pipeline.cache.writer import CacheWriter
from stillroom.pipeline.record import Example, TeacherRecord

TOKENS, DISTINCT = 1024, 64


@dataclass(frozen=True)
class Shape:
    """What a made-up cache holds."""

    vocab: int
    k: int
    profile: str
    per_shard: int


READ = Shape(49_152, 64, "small", 512)
TRAIN = Shape(1024, 512, "portable", 16)
BATCH_TOKENS = 8192


def make_record(shape: Shape, number: int) -> TeacherRecord:
    """A record whose lists look like a language model's: skewed ids, falling log-probabilities."""
    rng = np.random.default_rng(number)
    rows = TOKENS - 1
    ids = _distinct_ids(shape, rng, rows)
    gaps = rng.gamma(0.4, 0.5, size=(rows, shape.k)).astype(np.float32)
    logits = -np.cumsum(gaps, axis=1)
    tail = rng.uniform(0.01, 0.3, rows)
    lse = np.log(np.exp(logits).sum(axis=1) / (1 - tail))
    logprobs = (logits - lse[:, None]).astype(np.float32)
    tokens = rng.integers(0, shape.vocab, TOKENS).astype(np.int32)
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


def _distinct_ids(shape: Shape, rng: np.random.Generator, rows: int) -> np.ndarray:
    """int32 [rows, k], without repetition in a row, rising; where there is room, small ids more
    often."""
    if shape.k * 4 > shape.vocab:
        order = rng.permuted(np.tile(np.arange(shape.vocab, dtype=np.int32), (rows, 1)), axis=1)
        return np.sort(order[:, : shape.k], axis=1)
    drawn = (shape.vocab * rng.random((rows, 4 * shape.k)) ** 4).astype(np.int32)
    return np.sort(np.stack([np.unique(row)[: shape.k] for row in drawn]), axis=1)


def make_cache(shape: Shape, root: Path, gigabytes: float) -> CacheWriter:
    """Write and seal a cache of about this size, or go on with one."""
    records = [make_record(shape, number) for number in range(DISTINCT)]
    probe = _plan(shape, 1)
    with tempfile.TemporaryDirectory() as folder:
        writer = CacheWriter.open(folder, probe)
        if writer.needs_fit:
            writer.fit(records[:16])
        codec = writer.fitted().codec
        encoded = [writer.fitted().encode(record) for record in records]
    size = np.mean([_bytes(example) for example in encoded])
    plan = _plan(shape, int(gigabytes * 1e9 / size))
    writer = CacheWriter.open(root, plan)
    writer.use_codec(codec)
    for shard in writer.missing():
        count = len(plan.shard_range(shard))
        writer.write_encoded(shard, itertools.islice(itertools.cycle(encoded), count))
    writer.seal()
    return writer


def _bytes(example: Encoded) -> int:
    kept = example.values.values()
    return sum(memoryview(v).nbytes for v in kept if isinstance(v, (bytes, np.ndarray)))


def _plan(shape: Shape, num_examples: int) -> Plan:
    capture = {"k": shape.k, "tail_draws": 0, "temperatures": [1.0], "entropy": True}
    return Plan.make(
        teacher={"vocab_size": shape.vocab, "hidden_size": 0},
        engine={},
        tokenizer={},
        corpus={"digest": "made"},
        capture=capture | {"profile": shape.profile, "examples_per_shard": shape.per_shard},
        num_examples=num_examples,
        max_tokens=TOKENS,
    )


def read_all(root: str, gigabytes: float, queue) -> None:
    """Read every record in a limited address space, shards shuffled, as training does."""
    _limit(gigabytes)
    from stillroom.pipeline.cache.reader import TeacherCache

    cache = TeacherCache.open(root)
    started, tokens = time.perf_counter(), 0
    shards = np.random.default_rng(0).permutation(cache.plan.num_shards)
    for shard in shards:
        numbers = np.random.default_rng(shard).permutation(cache.plan.shard_range(int(shard)))
        for number in numbers:
            record = cache.read(int(number), ("topk_ids", "topk_logprobs", "tail_logprob"))
            tokens += len(record.example.token_ids)
    queue.put({"tokens": tokens, "seconds": time.perf_counter() - started, **_peak()})


def train_through(root: str, gigabytes: float, queue) -> None:
    """Train a tiny student on every example once, in a limited address space."""
    _limit(gigabytes)
    from stillroom.pipeline.cache.reader import TeacherCache
    from stillroom.pipeline.config import parse
    from stillroom.pipeline.training.trainer import train

    cache = TeacherCache.open(root)
    with tempfile.TemporaryDirectory() as folder:
        steps = len(cache) * TOKENS // BATCH_TOKENS
        settings = {"steps": steps, "batch_tokens": BATCH_TOKENS, "checkpoint_every": steps}
        made = _student(Path(folder, "made"))
        document = {
            "name": "stream",
            "directory": folder,
            "teacher": {"model": made},
            "student": {"init": "model", "model": made},
            "objective": [{"name": "forward_kl"}],
            "train": settings | {"cache": root, "log_every": max(steps // 20, 1)},
        }
        started = time.perf_counter()
        result = train(parse(document, "stream"))
        seconds = time.perf_counter() - started
    found = {"tokens": result.tokens, "seconds": seconds, "final_loss": result.final_loss}
    queue.put(found | {"steps": result.steps, **_peak()})


def _student(folder: Path) -> str:
    """A Llama of one narrow block with a tokenizer of as many words as the made-up vocabulary."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(TRAIN.vocab)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=TRAIN.vocab, num_hidden_layers=1, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return str(folder)


def _limit(gigabytes: float) -> None:
    limit = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _peak() -> dict[str, int]:
    return {"peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}


def main() -> None:
    """Measure and print."""
    parser = asking(__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--memory", type=float, default=2.0, help="GiB of address space")
    parser.add_argument("--train", action="store_true", help="train on it rather than read it")
    parser.add_argument("--cache", default="", help="where the cache goes; it is kept there")
    options = parser.parse_args()
    shape, work = (TRAIN, train_through) if options.train else (READ, read_all)
    temporary = None if options.cache else tempfile.mkdtemp()
    root = Path(options.cache or f"{temporary}/cache")
    started = time.perf_counter()
    try:
        writer = make_cache(shape, root, options.gigabytes)
        written = time.perf_counter() - started
        size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
        spawn = multiprocessing.get_context("spawn")
        queue = spawn.Queue()
        child = spawn.Process(target=work, args=(str(root), options.memory, queue))
        child.start()
        answer = _answer(queue, child)
        child.join()
    finally:
        if temporary:
            shutil.rmtree(temporary)
    result = {
        "what": "trained" if options.train else "read",
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


def _answer(queue, child) -> dict:
    """What the child found; RuntimeError if it ended without an answer, as for want of memory."""
    while child.is_alive():
        with contextlib.suppress(Empty):
            return queue.get(timeout=1)
    with contextlib.suppress(Empty):
        return queue.get(timeout=1)
    raise RuntimeError(f"the child ended with code {child.exitcode}")


if __name__ == "__main__":
    main()
