"""`merge`, `subset` and `reshard` keep every record, `diff` and `audit` measure what differs."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from stillroom.cache_schemas import layout
from stillroom.cache_schemas.errors import CacheError, PlanMismatch
from stillroom.pipeline.cache.care.audit import audit
from stillroom.pipeline.cache.care.comparing import diff, row_divergence
from stillroom.pipeline.cache.care.verification import verify
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.cache.sharing.copying import copy
from stillroom.pipeline.cache.sharing.rewriting import Selection, merge, reshard, subset
from stillroom.pipeline.cache.storage.directory import DirectoryStorage
from stillroom.pipeline.cache.writer import CacheWriter
from stillroom.pipeline.config import Capture, Teacher
from stillroom.pipeline.teacher.reference.engine import ReferenceEngine
from stillroom.stages.cache.compare import other_precision
from tests import memory_cache
from tests.synthetic_records import assert_same_record, make_plan, make_record, write_cache
from tests.tiny_models import save_llama

GOLDEN = Path(__file__).parents[1] / "golden" / "cache-v1"


def cache_at(root, plan, seed=0):
    root = write_cache(root, plan, seed, preview=lambda example: f"text of {example.source}")
    return TeacherCache.open(root)


@pytest.fixture
def cache(tmp_path):
    return cache_at(tmp_path / "first", make_plan(hidden_layers=[2], images=True))


def sound(root):
    assert verify(DirectoryStorage(root)).problems == []
    return TeacherCache.open(root)


def test_reshard_keeps_records_previews_and_corpus(cache, tmp_path):
    reshard(cache, tmp_path / "new", 4)
    new = sound(tmp_path / "new")
    assert new.shard_sizes == [4, 4, 2]
    for mine, theirs in zip(new, cache, strict=True):
        assert_same_record(mine, theirs)
    assert new.index(["preview"]).equals(cache.index(["preview"]))
    assert new.plan.facts["corpus"] == cache.plan.facts["corpus"]


def test_reshard_into_another_profile(cache, tmp_path):
    reshard(cache, tmp_path / "new", 4, profile="portable")
    for mine, theirs in zip(sound(tmp_path / "new"), cache, strict=True):
        assert_same_record(mine, theirs)


def test_reshard_of_a_partial_copy_holds_what_the_copy_holds(cache, tmp_path):
    copy(cache.storage, DirectoryStorage(tmp_path / "part"), ["logits"])
    reshard(TeacherCache.open(tmp_path / "part"), tmp_path / "new", 4)
    new = sound(tmp_path / "new")
    assert new.signals == cache.plan.row_signals
    assert set(new[3].signals) == set(cache.plan.row_signals)


def test_reshard_of_a_fitted_profile_copies_bytes(tmp_path):
    first = cache_at(tmp_path / "first", make_plan(profile="small"))
    reshard(first, tmp_path / "new", 5)
    for mine, theirs in zip(sound(tmp_path / "new"), first, strict=True):
        assert_same_record(mine, theirs)


@pytest.mark.parametrize(
    ("selection", "keeps"),
    [
        (Selection(sources=("code",)), [0, 3, 6, 9]),
        (Selection(sources=("code",), examples=2), [0, 3]),
        (Selection(examples=4), [0, 1, 2, 3]),
        (Selection(entropy=(0.0, 99.0)), list(range(10))),
    ],
)
def test_subset_keeps_what_was_selected(cache, tmp_path, selection, keeps):
    subset(cache, tmp_path / "new", selection)
    new = sound(tmp_path / "new")
    assert len(new) == len(keeps)
    for mine, number in zip(new, keeps, strict=True):
        assert_same_record(mine, cache[number])
    assert new.plan.facts["corpus"]["digest"] != cache.plan.facts["corpus"]["digest"]


def test_subset_by_entropy_and_by_tokens(cache, tmp_path):
    index = cache.index(["entropy", "num_tokens"]).to_pydict()
    low = float(np.median(index["entropy"]))
    subset(cache, tmp_path / "calm", Selection(entropy=(None, low)))
    assert len(sound(tmp_path / "calm")) == sum(e <= low for e in index["entropy"])
    budget = sum(index["num_tokens"][:3])
    subset(cache, tmp_path / "short", Selection(tokens=budget))
    assert sound(tmp_path / "short").manifest.num_tokens == budget


def test_an_empty_subset_is_refused(cache, tmp_path):
    with pytest.raises(CacheError, match="no example is left"):
        subset(cache, tmp_path / "new", Selection(sources=("poetry",)))


def test_merge_joins_caches_and_keeps_the_first_of_a_repeated_example(cache, tmp_path):
    other = cache_at(tmp_path / "second", longer(cache.plan), seed=5)
    merge([cache, other], tmp_path / "new")
    new = sound(tmp_path / "new")
    assert len(new) == 14
    for number in range(14):
        seed = 0 if number < 10 else 5
        assert_same_record(new[number], make_record(other.plan, number, seed))


def longer(plan):
    facts = {**plan.facts, "shards": {"count": 5, "examples_per_shard": 3, "num_examples": 14}}
    return dataclasses.replace(plan, facts=facts)


def test_merge_of_unlike_caches_names_the_difference(cache, tmp_path):
    other = cache_at(tmp_path / "second", make_plan(k=4, hidden_layers=[2]))
    with pytest.raises(PlanMismatch, match=r"capture\.k: found 4, expected 8"):
        merge([cache, other], tmp_path / "new")


def test_merge_of_other_tables_needs_recoding(tmp_path):
    plan = make_plan(profile="small")
    first = cache_at(tmp_path / "first", plan)
    second = cache_at(tmp_path / "second", longer(plan), seed=3)
    with pytest.raises(PlanMismatch, match="--recode"):
        merge([first, second], tmp_path / "new")
    merge([first, second], tmp_path / "new", recode=True)
    new = sound(tmp_path / "new")
    assert_same_record(new[2], first[2])
    ids = np.sort(new[12].signals["topk_ids"], axis=1)
    np.testing.assert_array_equal(ids, np.sort(second[12].signals["topk_ids"], axis=1))


def test_diff_of_a_cache_with_itself_is_nothing(cache):
    found = diff(cache, cache)
    assert (found.plan, found.only_first, found.only_second, found.shared) == ([], 0, 0, 10)
    assert found.values is not None
    assert (found.values.kl_max, found.values.top1, found.values.hidden["hidden.2"]) == (0, 1, 0)


def test_diff_of_other_answers_measures_them(cache, tmp_path):
    found = diff(cache, cache_at(tmp_path / "second", longer(cache.plan), seed=5))
    assert (found.only_first, found.only_second, found.shared) == (0, 4, 10)
    assert found.plan == [
        "shards.count: found 5, expected 4",
        "shards.num_examples: found 14, expected 10",
    ]
    assert found.values is not None
    assert found.values.kl_mean > 0.1
    assert found.values.hidden["hidden.2"] > 0.1


def test_diff_of_draws_alone_compares_the_tokens_that_followed(tmp_path):
    """k = 0 keeps no list; KL of the token against all others is a lower bound."""
    plan = make_plan(k=0, tail_draws=4)
    first = cache_at(tmp_path / "first", plan)
    same = diff(first, first).values
    assert same is not None
    assert (same.kl_max, np.isnan(same.top1)) == (0, True)
    other = diff(first, cache_at(tmp_path / "second", plan, seed=5)).values
    assert other is not None
    assert other.kl_mean > 0.01
    record, again = first[0], make_record(plan, 0, seed=5)
    p, q = (np.exp(r.signals["token_logprob"].astype(np.float64)) for r in (record, again))
    expected = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    np.testing.assert_allclose(row_divergence(record, again)[0], expected, rtol=1e-6)


def test_row_divergence_agrees_with_the_whole_sum():
    """Both lists over the same ids: the coarsening is the distribution itself."""
    plan = make_plan(num_examples=1)
    first, second = make_record(plan, 0), make_record(plan, 0)
    shift = np.linspace(-0.2, 0.1, 8, dtype=np.float32)
    second.signals["topk_logprobs"] = first.signals["topk_logprobs"] + shift
    p = np.exp(first.signals["topk_logprobs"].astype(np.float64))
    q = np.exp(second.signals["topk_logprobs"].astype(np.float64))
    rest_p, rest_q = 1 - p.sum(1), 1 - q.sum(1)
    expected = (p * np.log(p / q)).sum(1) + rest_p * np.log(rest_p / rest_q)
    found, furthest = row_divergence(first, second)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert furthest == pytest.approx(0.2, rel=1e-4)


@pytest.mark.parametrize("kept", [{"hidden_layers": [2]}, {"k": 0, "tail_draws": 4}])
def test_audit_passes_the_teacher_itself_and_fails_another(kept, tmp_path):
    cache = cache_at(tmp_path / "first", make_plan(**kept))
    mine = audit(cache, lambda examples: [answer(cache, e, seed=0) for e in examples])
    assert mine.passed
    other = audit(cache, lambda examples: [answer(cache, e, seed=1) for e in examples])
    assert not other.passed
    assert other.live.kl_max == 0


@pytest.mark.parametrize("mean_kl", [1e-4, 5e-3])
def test_audit_passes_a_copy_of_whatever_profile(tmp_path, mean_kl):
    """What a lossy profile costs is measured on the rows, not looked up."""
    cache = cache_at(tmp_path / "first", make_plan(profile="small", mean_kl=mean_kl))
    found = audit(cache, lambda examples: [answer(cache, e, seed=0) for e in examples])
    assert found.passed
    assert found.cached.kl_mean == pytest.approx(found.stored.kl_mean, rel=1e-6)
    assert found.cached.kl_mean > 0


def test_audit_knows_another_precision_from_another_teacher(tiny_llama, tmp_path):
    texts = memory_cache.examples(4)

    def score(dtype, model=tiny_llama):
        def answers(examples):
            teacher = Teacher(model=str(model), dtype=dtype)
            return list(ReferenceEngine(teacher, Capture(k=16)).score(examples))

        return answers

    kept = memory_cache.captured(tiny_llama, texts)
    half = dataclasses.replace(kept, records=tuple(score("bfloat16")(texts)))
    cache = TeacherCache.open(half.write(tmp_path / "half"))
    assert not audit(cache, score("float32")).passed
    found = audit(cache, score("float32"), other=score("bfloat16"))
    assert found.passed
    assert found.other.kl_mean > 10 * found.live.kl_mean
    other = save_llama(tmp_path / "other", seed=5)
    assert not audit(cache, score("float32", other), other=score("bfloat16", other)).passed
    plan = {"teacher": {"dtype": "bfloat16"}, "engine": {"name": "vllm"}}
    asked = {
        dtype: Teacher(model=str(tiny_llama), dtype=dtype) for dtype in ("float32", "bfloat16")
    }
    assert other_precision(plan, "vllm", asked["bfloat16"]) == ""
    assert other_precision(plan, "reference", asked["bfloat16"]) == "float32"
    assert other_precision(plan, "vllm", asked["float32"]) == "bfloat16"


def answer(cache, example, seed):
    ids = cache.index(["example_id"]).column("example_id").to_pylist()
    return make_record(cache.plan, ids.index(example.example_id), seed)


def test_a_portable_cache_of_the_first_kind_gets_a_list_for_every_row(tmp_path):
    """And goes on with one list of all rows where it was begun so."""
    first = TeacherCache.open(GOLDEN / "portable")
    reshard(first, tmp_path / "new", 3)
    new = TeacherCache.open(tmp_path / "new")
    assert (first.form.codec.nested, new.form.codec.nested) == (False, True)
    for found, expected in zip(new, first, strict=True):
        assert_same_record(found, expected)
    begun = shutil.copytree(GOLDEN / "portable", tmp_path / "begun")
    (begun / layout.MANIFEST).unlink()
    (begun / layout.receipt(1)).unlink()
    writer = CacheWriter.open(begun, first.plan)
    writer.write(1, [first[number] for number in first.plan.shard_range(1)])
    writer.seal()
    assert not TeacherCache.open(begun).form.codec.nested
    assert verify(DirectoryStorage(begun)).problems == []
