"""The capture loop around any engine: resuming, shares, bad examples, memory, what it tells."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from stillroom.cache_schemas.errors import PlanMismatch, TeacherError
from stillroom.pipeline.cache.care.verification import verify
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.cache.storage.directory import DirectoryStorage
from stillroom.pipeline.capture.cost import estimate
from stillroom.pipeline.capture.job import capture
from stillroom.pipeline.capture.plan import engine_facts, make_plan
from stillroom.pipeline.config import Capture, Prepare, Run, Source, Teacher
from stillroom.pipeline.corpus.preparing import Corpus, prepare
from stillroom.pipeline.teacher.arguments import SPEED_AND_PLACEMENT
from stillroom.pipeline.teacher.opening import open_engine
from stillroom.pipeline.teacher.protocol import (
    OutOfMemory,
    RejectedExample,
    empty_record,
)

TABLE = Capture(k=8, tail_draws=4, hidden_layers=(2, "final"), examples_per_shard=4)


@pytest.fixture(scope="module")
def corpus(tiny_llama, tmp_path_factory):
    """A prepared corpus: two help topics in windows of 64 tokens."""
    source = Source(name="help", kind="pydoc_topics", limit=2)
    settings = Prepare(source=(source,), window=64, heldout=0.0)
    return prepare(settings, str(tiny_llama), tmp_path_factory.mktemp("corpus") / "corpus")


@pytest.fixture
def run(corpus, tiny_llama, tmp_path):
    (tmp_path / "corpus").symlink_to(corpus.directory)
    teacher = Teacher(model=str(tiny_llama), dtype="float32")
    return Run(name="run", directory=str(tmp_path), teacher=teacher, capture=TABLE)


class Faulty:
    """The reference engine, with one fault at one example."""

    def __init__(self, run: Run, fault, at: int):
        self.inner = open_engine("reference", run.teacher, run.capture)
        self.shape, self.fault, self.at, self.asked = self.inner.shape, fault, at, 0
        self.closed = False

    def score(self, examples, reject=None):
        for example in examples:
            self.asked += 1
            if self.asked == self.at:
                error = self.fault(example)
                if not isinstance(error, RejectedExample):
                    raise error
                reject(error)
                yield empty_record(example, TABLE, self.shape)
                continue
            yield from self.inner.score([example])

    def close(self):
        self.closed = True


def manifest_bytes(run: Run) -> bytes:
    return run.path("cache", "manifest.json").read_bytes()


def elsewhere(run: Run, name: str) -> Run:
    directory = run.path(name)
    directory.mkdir()
    (directory / "corpus").symlink_to(run.path("corpus"))
    return run.model_copy(update={"directory": str(directory)})


@pytest.mark.parametrize("profile", ["small", "strict", "exact", "portable"])
def test_a_nucleus_keeps_the_fewest_ids_that_reach_its_mass(run, profile):
    whole, cut = elsewhere(run, "whole"), elsewhere(run, "cut")
    settings = Capture(k=64, profile=profile, examples_per_shard=4)
    caches = []
    for own, nucleus in ((whole, 0.0), (cut, 0.3)):
        table = settings.model_copy(update={"nucleus": nucleus})
        capture(own.model_copy(update={"capture": table}), engine="reference")
        assert verify(DirectoryStorage(own.path("cache"))).problems == []
        caches.append(TeacherCache.open(str(own.path("cache"))))
    assert "nucleus" not in caches[0].plan.facts["capture"]
    slack = 0 if profile in ("exact", "portable") else 0.05
    for full, kept in zip(*caches, strict=True):
        ids, p = kept.signals["topk_ids"], np.exp(kept.signals["topk_logprobs"])
        counts = (ids >= 0).sum(axis=1)
        assert (p[ids < 0] == 0).all()
        reached = p.sum(axis=1) >= 0.3 - slack
        assert (reached | (counts == 64)).all()
        before = p.sum(axis=1) - p[np.arange(len(p)), counts - 1]
        assert (before < 0.3 + slack).all()
        inside = np.arange(64) < counts[:, None]
        full_sets = [set(row[:n]) for row, n in zip(full.signals["topk_ids"], counts)]
        if not slack:
            assert [set(row[row >= 0]) for row in ids] == full_sets
            assert (np.diff(inside.astype(int), axis=1) <= 0).all()
        total = p.sum(axis=1) + np.exp(kept.signals["tail_logprob"])
        np.testing.assert_allclose(total, 1, atol=1e-5 if not slack else 0.1)


def test_a_nucleus_goes_without_draws():
    for settings in ({"tail_draws": 4}, {"k": 0, "tail_draws": 4}):
        with pytest.raises(ValueError, match="goes without tail_draws"):
            Capture(nucleus=0.9, **settings)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, (12, 56)),
        ({"k": 64}, (64, 0)),
        ({"nucleus": 0.9}, (12, 0)),
        ({"tail_draws": 4}, (12, 4)),
    ],
)
def test_lists_that_are_asked_for_come_without_draws(given, kept):
    table = Capture(**given)
    assert (table.k, table.tail_draws) == kept
    assert Capture(**table.model_dump()) == table


def test_an_interrupted_capture_goes_on_and_seals_the_same(run):
    whole = elsewhere(run, "whole")
    capture(whole, engine="reference")
    engine = Faulty(run, lambda _: KeyboardInterrupt(), at=18)
    with pytest.raises(KeyboardInterrupt):
        capture(run, engine="reference", open_engine=lambda _: engine)
    assert engine.closed
    kept = sorted(run.path("cache", "receipts").rglob("*.json"))
    assert 0 < len(kept) < TeacherCache.open(str(whole.path("cache"))).plan.num_shards
    before = [path.stat().st_mtime_ns for path in kept]
    capture(run, engine="reference")
    assert [path.stat().st_mtime_ns for path in kept] == before
    assert manifest_bytes(run) == manifest_bytes(whole)


def test_workers_share_the_shards_and_the_last_one_seals(run):
    whole = elsewhere(run, "whole")
    capture(whole, engine="reference")
    assert capture(run, engine="reference", rank=1, world_size=3) is None
    assert capture(run, engine="reference", rank=2, world_size=3) is None
    assert capture(run, engine="reference", rank=0, world_size=3) is not None
    assert manifest_bytes(run) == manifest_bytes(whole)


def test_a_finished_capture_starts_no_engine(run):
    manifest = capture(run, engine="reference")

    def never(_scale):
        raise AssertionError("an engine was started")

    assert capture(run, engine="reference", open_engine=never) == manifest


def test_a_bad_example_stops_the_run_by_default(run):
    fault = Faulty(run, lambda e: RejectedExample(e, "NaN or infinite logits at position 3"), at=6)
    with pytest.raises(RejectedExample, match="position 3"):
        capture(run, engine="reference", open_engine=lambda _: fault)
    assert not run.path("rejects.jsonl").exists()


def test_a_bad_example_is_set_aside_on_request(run, corpus):
    fault = Faulty(run, lambda e: RejectedExample(e, "NaN or infinite logits at position 3"), at=6)
    capture(run, engine="reference", on_error="quarantine", open_engine=lambda _: fault)
    lines = [json.loads(line) for line in run.path("rejects.jsonl").read_text().splitlines()]
    (rejected,) = [line["example_id"] for line in lines]
    assert "position 3" in lines[0]["reason"]
    cache = TeacherCache.open(str(run.path("cache")))
    examples = corpus.split("train")
    empty = [i for i in range(len(cache)) if cache[i].num_rows == 0]
    assert [examples[i].example_id for i in empty] == [rejected]
    assert len(cache) == len(examples)


def test_out_of_memory_halves_the_batch_once(run):
    scales = []

    def start(scale):
        scales.append(scale)
        error = OutOfMemory("no room", remedy="Set max_num_batched_tokens.")
        return Faulty(run, lambda _: error, at=10 if scale == 1.0 else 0)

    assert capture(run, engine="reference", open_engine=start) is not None
    assert scales == [1.0, 0.5]


def test_out_of_memory_twice_says_what_to_set(run):
    error = OutOfMemory("no room", remedy="Set max_num_batched_tokens.")
    with pytest.raises(TeacherError, match="max_num_batched_tokens"):
        capture(run, engine="reference", open_engine=lambda _: Faulty(run, lambda _: error, at=10))
    whole = capture(run, engine="reference")
    assert whole is not None


def test_progress_counts_every_token_once(run, corpus):
    seen = []
    capture(run, engine="reference", on_progress=seen.append)
    last, tokens = seen[-1], corpus.facts["counts"]["train"]["tokens"]
    assert last.examples == last.total_examples == len(corpus.split("train"))
    assert last.shards == last.total_shards
    assert last.committed_tokens == tokens
    assert last.seconds_left == 0.0
    assert last.bytes == sum(receipt_bytes(run))
    cache = TeacherCache.open(str(run.path("cache")))
    tails = np.concatenate([np.exp(cache[i].signals["tail_logprob"]) for i in range(len(cache))])
    assert last.retained_mass == pytest.approx(1 - tails.mean(), abs=1e-3)
    assert 0 < last.entropy < math.log(768)
    assert all(a.examples <= b.examples for a, b in itertools.pairwise(seen))


def test_no_example_is_scored_twice_and_every_step_is_announced(run, corpus):
    asked, seen = [], []
    engine = open_engine("reference", run.teacher, run.capture)
    score = engine.score

    def counted(examples, reject):
        for example in examples:
            asked.append(example.example_id)
            yield from score([example], reject)

    engine.score = counted
    small = run.model_copy(update={"capture": run.capture.model_copy(update={"profile": "small"})})
    capture(small, engine="reference", on_progress=seen.append, open_engine=lambda _: engine)
    assert asked == [example.example_id for example in corpus.split("train")]
    steps = [step for step, _ in itertools.groupby(now.doing for now in seen)]
    fitting = "fitting the codec's tables on the first shard"
    assert steps == ["starting the teacher", fitting, "scoring"]
    assert seen[0].examples == 0


def receipt_bytes(run: Run) -> list[int]:
    lines = run.path("capture.0.jsonl").read_text().splitlines()
    return [json.loads(line)["bytes"] for line in lines]


def test_a_log_line_for_each_shard(run):
    manifest = capture(run, engine="reference")
    lines = [json.loads(x) for x in run.path("capture.0.jsonl").read_text().splitlines()]
    assert [line["shard"] for line in lines] == list(range(len(manifest.shards)))
    assert [line["tokens"] for line in lines] == manifest.shards.num_tokens


def test_the_estimate_is_of_the_real_thing_and_leaves_nothing(run, corpus):
    cost = estimate(run, engine="reference")
    manifest = capture(run, engine="reference")
    assert cost.tokens == sum(manifest.shards.num_tokens)
    assert cost.examples == len(corpus.split("train"))
    assert cost.gigabytes * 1e9 == pytest.approx(sum(manifest.shards.bytes), rel=0.5)
    assert cost.tokens_per_second > 0
    assert not run.path("rejects.jsonl").exists()


def test_what_changes_meaning_changes_the_plan(run, corpus):
    def plan(teacher=run.teacher, table=run.capture):
        return make_plan(corpus, "train", teacher, table, "reference")

    first = plan()
    assert plan().digest == first.digest
    for changed in ({"k": 9}, {"temperatures": (2.0,)}, {"seed": 1}, {"hidden_stride": 2}):
        assert plan(table=run.capture.model_copy(update=changed)).digest != first.digest
    for changed in ({"dtype": "bfloat16"}, {"engine_args": {"kv_cache_dtype": "fp8"}}):
        assert plan(teacher=run.teacher.model_copy(update=changed)).digest != first.digest
    assert engine_facts("reference")["name"] == "reference"


def test_speed_and_placement_are_not_in_the_plan(run, corpus):
    arguments = dict.fromkeys(SPEED_AND_PLACEMENT, 1)
    fast = run.teacher.model_copy(update={"engine_args": arguments})
    plans = [
        make_plan(corpus, "train", teacher, run.capture, "reference")
        for teacher in (run.teacher, fast)
    ]
    assert plans[0].digest == plans[1].digest


def test_other_weights_and_other_tokens_are_refused(run, tiny_qwen3, tmp_path):
    capture(run, engine="reference")
    other = run.capture.model_copy(update={"k": 9})
    with pytest.raises(PlanMismatch, match=r"capture\.k: found 8, expected 9"):
        capture(run.model_copy(update={"capture": other}), engine="reference")
    changed = run.model_copy(update={"teacher": Teacher(model=str(tiny_qwen3), dtype="float32")})
    with pytest.raises(PlanMismatch, match=r"weights_sha256|another tokenizer"):
        capture(changed, engine="reference")


def test_a_corpus_of_another_tokenizer_is_refused(run, corpus):
    facts = corpus.facts | {"tokenizer": corpus.facts["tokenizer"] | {"sha256": "0" * 64}}
    directory = run.path("other")
    directory.mkdir()
    (directory / "corpus").mkdir()
    for path in corpus.directory.iterdir():
        (directory / "corpus" / path.name).symlink_to(path)
    (directory / "corpus" / "corpus.json").unlink()
    (directory / "corpus" / "corpus.json").write_text(json.dumps(facts))
    assert Corpus.open(directory / "corpus").facts["tokenizer"]["sha256"] == "0" * 64
    with pytest.raises(PlanMismatch, match="another tokenizer"):
        capture(run.model_copy(update={"directory": str(directory)}), engine="reference")


def test_an_empty_record_has_every_signal_and_no_row(run, corpus):
    engine = open_engine("reference", run.teacher, run.capture)
    example = corpus.split("train")[0]
    (full,) = engine.score([example])
    empty = empty_record(example, run.capture, engine.shape)
    assert empty.num_rows == 0
    assert empty.example == replace(
        example, token_ids=example.token_ids[:1], loss_mask=np.zeros(1, dtype=bool)
    )
    for name, array in full.signals.items():
        assert empty.signals[name].dtype == array.dtype
        assert empty.signals[name].shape == (0, *array.shape[1:])
