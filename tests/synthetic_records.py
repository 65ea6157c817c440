"""Teacher records made up from a seed: right in every invariant, cheap, and without any model."""

from dataclasses import replace

import numpy as np

from stillroom.cache_schemas.manifest import Plan
from stillroom.pipeline.cache.writer import CacheWriter
from stillroom.pipeline.record import Example, ImageSpan, TeacherRecord, content_id

VOCAB = 997
TEMPERATURES = (0.5, 1.0, 2.0)


def make_plan(num_examples=10, per_shard=3, max_tokens=24, images=False, **capture) -> Plan:
    """A plan whose signals `make_record` can supply."""
    table = {
        "k": 8,
        "tail_draws": 0,
        "temperatures": list(TEMPERATURES),
        "entropy": True,
        "moments": False,
        "hidden_layers": [],
        "hidden_codec": "bf16",
        "hidden_step": 0.05,
        "profile": "exact",
        "examples_per_shard": per_shard,
        "seed": 0,
    }
    return Plan.make(
        teacher={"vocab_size": VOCAB, "hidden_size": 12, "weights_sha256": "0" * 64},
        engine={"name": "synthetic", "version": "1"},
        tokenizer={"sha256": "1" * 64},
        corpus={"digest": "2" * 64, "split": "train"},
        capture=table | capture,
        num_examples=num_examples,
        max_tokens=max_tokens,
        images=images,
    )


def make_candidates_plan(num_examples=5, per_shard=2, candidates=4, items=50) -> Plan:
    """A plan of lists of a catalogue, as `make_record` supplies them."""
    plain = make_plan(num_examples, per_shard, profile="portable")
    signals = {"rows": [], "dense": {}}
    signals["examples"] = ["candidate_distances", "candidate_ids", "written_ids"]
    catalogue = {"digest": "3" * 64, "items": items}
    capture = {"candidates": candidates, "catalogue": catalogue, "method": "grounded"}
    facts = plain.facts | {"signals": signals, "capture": plain.facts["capture"] | capture}
    return Plan.from_facts(facts, "test")


def make_record(plan: Plan, number: int, seed: int = 0) -> TeacherRecord:
    """Record of one example; the same arguments give the same bytes. The seed changes what the
    teacher says, not what it is asked."""
    example = _example(plan, np.random.default_rng(number), number)
    rng = np.random.default_rng((seed, number))
    num_rows = example.num_rows
    if plan.example_signals:
        return _candidates(plan, example, rng)
    signals = _row_signals(plan, rng, num_rows, example.token_ids[example.first_row + 1 :])
    positions = np.empty(0, dtype=np.int32)
    if plan.dense_signals:
        positions = np.arange(example.first_row, len(example.token_ids) - 1, dtype=np.int32)
    for name, shape in plan.dense_signals.items():
        signals[name] = _bf16(rng.normal(size=(num_rows, shape["width"])))
    return TeacherRecord(example, example.first_row, signals, positions)


def _candidates(plan: Plan, example: Example, rng: np.random.Generator) -> TeacherRecord:
    """Lists that grow shorter with the example's weight, and no tokens."""
    capture = plan.facts["capture"]
    count, items = capture["candidates"], capture["catalogue"]["items"]
    used = max(0, count - int(example.weight) % 3)
    ids, distances = np.full(count, -1, np.int32), np.full(count, np.inf, np.float32)
    ids[:used] = rng.permutation(items)[:used]
    distances[:used] = np.sort(rng.random(used)).astype(np.float32)
    written = rng.integers(0, VOCAB, size=used).astype(np.int32)
    bare = replace(example, token_ids=example.token_ids[:0], loss_mask=example.loss_mask[:0])
    said = {"candidate_ids": ids, "candidate_distances": distances, "written_ids": written}
    return TeacherRecord(bare, 0, said)


def records_of(plan: Plan, shard: int, seed: int = 0) -> list[TeacherRecord]:
    """All records of a shard."""
    return [make_record(plan, number, seed) for number in plan.shard_range(shard)]


def write_cache(root, plan: Plan, seed: int = 0, shards: list[int] | None = None, preview=None):
    """A sealed cache of every record; with `shards`, an unsealed one of these alone.

    Returns:
        `root`.
    """
    writer = CacheWriter.open(root, plan, preview=preview)
    for shard in writer.missing() if shards is None else shards:
        writer.write(shard, records_of(plan, shard, seed))
    if shards is None:
        writer.seal()
    return root


def assert_same_record(found: TeacherRecord, expected: TeacherRecord) -> None:
    """Bit for bit, every field."""
    assert found.example == expected.example
    assert found.first_row == expected.first_row
    assert set(found.signals) == set(expected.signals)
    np.testing.assert_array_equal(found.hidden_positions, expected.hidden_positions)
    for name, array in expected.signals.items():
        assert found.signals[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found.signals[name], array, err_msg=name)


def _example(plan: Plan, rng: np.random.Generator, number: int) -> Example:
    longest = max((s["positions"] for s in plan.dense_signals.values()), default=24)
    length = int(rng.integers(2, longest + 1))
    tokens = rng.integers(0, VOCAB, size=length).astype(np.int32)
    mask = rng.random(length) < 0.7
    mask[-1] = True
    spans = (ImageSpan(f"{number:064x}", 0, 2),) if plan.facts["images"] and number % 2 else ()
    return Example(
        example_id=content_id(tokens, mask, spans),
        document_id=f"document-{number // 2}",
        source="prose" if number % 3 else "code",
        token_ids=tokens,
        loss_mask=mask,
        images=spans,
        weight=0.5 + number,
    )


def _row_signals(
    plan: Plan, rng: np.random.Generator, num_rows: int, following: np.ndarray
) -> dict[str, np.ndarray]:
    """Every signal from real logits of a small vocabulary."""
    k = plan.facts["capture"]["k"]
    logits = rng.normal(scale=3.0, size=(num_rows, VOCAB))
    lse = np.stack([_lse(logits / t) for t in TEMPERATURES], axis=1)
    logprobs = logits - lse[:, 1:2]
    order = np.argsort(-logprobs, axis=1, kind="stable")
    top = np.take_along_axis(logprobs, order[:, :k], axis=1)
    actual = np.take_along_axis(logprobs, following[:, None].astype(np.int64), axis=1)[:, 0]
    mean, std = logits.mean(axis=1), logits.std(axis=1)
    every = {
        "topk_ids": order[:, :k].astype(np.int32),
        "topk_logprobs": top.astype(np.float32),
        "tail_logprob": np.log1p(-np.exp(top).sum(axis=1)).astype(np.float32),
        "token_logprob": actual.astype(np.float32),
        "token_rank": 1 + (logprobs > actual[:, None]).sum(axis=1).astype(np.int32),
        "entropy": -(np.exp(logprobs) * logprobs).sum(axis=1).astype(np.float32),
        "lse": lse.astype(np.float32),
        "logit_mean": mean.astype(np.float32),
        "logit_std": std.astype(np.float32),
        "zscore_lse": _lse((logits - mean[:, None]) / (1e-7 + std[:, None])).astype(np.float32),
    }
    if draws := plan.facts["capture"]["tail_draws"]:
        every["draw_ids"] = order[:, k : k + draws].astype(np.int32)
        every["draw_counts"] = np.ones((num_rows, draws), dtype=np.int32)
    return {name: every[name] for name in plan.row_signals}


def _lse(logits: np.ndarray) -> np.ndarray:
    top = logits.max(axis=1)
    return top + np.log(np.exp(logits - top[:, None]).sum(axis=1))


def _bf16(array: np.ndarray) -> np.ndarray:
    """float32 values that bf16 holds exactly."""
    bits = array.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)
