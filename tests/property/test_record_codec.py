"""Round trips of records within the stated bounds: every profile, any k, any number of rows."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stillroom.cache_schemas.lossy_rows import LISTS
from stillroom.cache_schemas.record_codec import MAX_KL, MEAN_KL, NAMES, RowCodec
from tests.codec_samples import (
    SHAPES,
    assert_draws,
    assert_same,
    assert_within_bounds,
    divergence,
    record,
    sorted_rows,
)

PROFILES = ("exact", "small", "strict")
sizes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32 - 1),
        "rows": st.sampled_from([0, 1, 2, 5, 33]),
        "k": st.sampled_from([0, 1, 2, 3, 4, 5, 16, 17, 63, 66, 130]),
        "vocab": st.sampled_from([131, 300, 9000]),
        "shape": st.sampled_from(SHAPES),
        "draws": st.sampled_from([0, 1, 8]),
        "prompt": st.sampled_from([1, 2, 7]),
        "nucleus": st.booleans(),
    }
)

NO_ROWS = {"seed": 0, "rows": 0, "k": 1, "vocab": 131, "shape": "peaked"}
NO_ROWS |= {"draws": 0, "prompt": 1, "nucleus": False}


def fitted(profile: str, size: dict, samples: list) -> RowCodec:
    return RowCodec.fit(
        profile,
        samples,
        k=size["k"],
        vocab_size=size["vocab"],
        draws=size["draws"],
        temperatures=2,
    )


@settings(max_examples=60, deadline=None)
@given(size=sizes, profile=st.sampled_from(PROFILES), foreign=st.booleans())
def test_round_trip_stays_within_the_stated_bounds(size, profile, foreign):
    """`foreign`: the codec was fitted on rows of another teacher."""
    expected = record(**size)
    sample = record(**size | {"seed": 1, "rows": 300, "shape": "peaked"}) if foreign else expected
    codec = fitted(profile, size, [sample])
    found = RowCodec.from_facts(codec.facts(), codec.tables).decode(codec.encode(expected))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
    if profile == "exact":
        assert_same(found, expected)
    else:
        assert_within_bounds(profile, found, expected)


@settings(max_examples=40, deadline=None)
@given(
    size=sizes,
    profile=st.sampled_from(PROFILES),
    kept=st.sets(st.sampled_from(NAMES)),
    wanted=st.sets(st.sampled_from(NAMES)),
)
@example(size=NO_ROWS, profile="small", kept={"topk_ids", "topk_logprobs"}, wanted={"tail_logprob"})
@example(size=NO_ROWS, profile="small", kept={*LISTS}, wanted={"tail_logprob"})
def test_any_subset_of_signals_is_stored_and_any_subset_is_read(size, profile, kept, wanted):
    expected = record(**size)
    codec = fitted(profile, size, [expected])
    part = {name: array for name, array in expected.items() if name in kept}
    blob = codec.encode(part)
    everything = codec.decode(blob)
    assert everything.keys() == part.keys()
    assert_same(codec.decode(blob, wanted), {n: everything[n] for n in wanted & part.keys()})


@pytest.mark.parametrize("vocab", [1 << 16, (1 << 16) + 1, 151_936, 1 << 20])
def test_large_vocabularies(vocab):
    rng = np.random.default_rng(0)
    ids = np.stack([rng.choice(vocab, 8, replace=False) for _ in range(200)]).astype(np.int32)
    ids[0, :2] = 0, vocab - 1
    logprobs = np.sort(np.log(rng.dirichlet(np.ones(9), 200))[:, :8], axis=1)[:, ::-1]
    expected = {"topk_ids": ids, "topk_logprobs": logprobs.astype(np.float32)}
    codec = RowCodec.fit("small", [expected], k=8, vocab_size=vocab)
    found = codec.decode(codec.encode(expected))
    np.testing.assert_array_equal(sorted_rows(found)[0], sorted_rows(expected)[0])


def test_small_rows_and_their_tail_sum_to_one():
    expected = record(0, rows=200, k=16, vocab=500)
    codec = fitted("small", {"k": 16, "vocab": 500, "draws": 0}, [expected])
    found = codec.decode(codec.encode(expected))
    mass = np.exp(found["topk_logprobs"], dtype=np.float64).sum(axis=1)
    np.testing.assert_allclose(mass + np.exp(found["tail_logprob"], dtype=np.float64), 1, atol=1e-6)


def test_a_row_that_would_lose_too_much_is_coded_with_finer_levels():
    """A codebook fitted on certain rows is too coarse for flat ones; the bound still holds."""
    certain = record(0, rows=200, k=64, vocab=300, shape="saturated")
    flat = record(1, rows=200, k=64, vocab=300, shape="flat")
    codec = fitted("small", {"k": 64, "vocab": 300, "draws": 0}, [certain])
    blob, error = codec.encode_measured(flat)
    assert error.kl_max <= MAX_KL * MEAN_KL
    measured = divergence(flat, codec.decode(blob))
    assert error.kl_max == pytest.approx(measured.max(), abs=1e-9)
    assert error.kl_mean == pytest.approx(measured.mean(), abs=1e-9)


def test_fit_and_encode_depend_on_nothing_but_the_samples():
    samples = [record(seed, rows=300, k=8, vocab=400) for seed in range(3)]
    size = {"k": 8, "vocab": 400, "draws": 0}
    first, second = (fitted("small", size, samples) for _ in range(2))
    assert first.facts() == second.facts()
    assert first.encode(samples[0]) == second.encode(samples[0])


def test_classes_make_records_smaller_than_one_order_of_the_vocabulary():
    """Rows of four kinds, each with its own ids: four lists are worth two bits an id and more."""
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(2000).astype(np.int32).reshape(4, 500)

    def rows(count: int) -> dict:
        kinds = rng.integers(0, 4, count)
        ids = np.stack([rng.permutation(shuffled[kind])[:32] for kind in kinds])
        logprobs = np.full((count, 32), -np.log(40), dtype=np.float32)
        return {"topk_ids": ids, "topk_logprobs": logprobs}

    clustered = RowCodec.fit("small", [rows(2000)], k=32, vocab_size=2000)
    one_order = RowCodec.fit("small", [], k=32, vocab_size=2000)
    held_out = rows(500)
    saved = len(one_order.encode(held_out)) - len(clustered.encode(held_out))
    assert saved > 500 * 32 * 1.5 / 8


@pytest.mark.parametrize("profile", PROFILES)
def test_records_of_draws_alone(profile):
    """k = 0: no exact ids, draws from the whole distribution, a tail that is everything."""
    size = {"k": 0, "vocab": 500, "draws": 16}
    samples = [record(seed, rows=400, **size) for seed in range(3)]
    codec = fitted(profile, size, samples[1:])
    blob = codec.encode(samples[0])
    found = codec.decode(blob)
    assert (found["topk_ids"].shape, found["topk_logprobs"].shape) == ((400, 0), (400, 0))
    np.testing.assert_array_equal(found["tail_logprob"], np.zeros(400, dtype=np.float32))
    assert_draws(found, samples[0])
    assert_same(found, samples[0], ("token_ids", "token_rank"))
    assert found["draw_counts"].sum(axis=1).min() == 16


@pytest.mark.parametrize("profile", ["small", "strict"])
def test_the_widths_of_the_levels_tell_what_rounding_cost(profile):
    size = {"k": 64, "vocab": 9000, "draws": 0, "seed": 3, "rows": 600, "shape": "peaked"}
    given_rows = record(**size)
    codec = fitted(profile, size, [given_rows])
    blob, measured = codec.encode_measured(given_rows)
    told = codec.lists(blob)[0].rounding()
    assert told.shape == (600,)
    assert 0.5 * measured.kl_mean < told.mean() < 2 * measured.kl_mean
