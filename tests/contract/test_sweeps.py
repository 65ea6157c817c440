"""All sweeps against dense float64 formulas, and their draws against the dense distribution.

STILLROOM_TEST_SWEEPS names which (the Triton one runs under its interpreter or on a GPU only) and
STILLROOM_TEST_DEVICE where.
"""

import os
from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.cache_schemas.errors import ConfigError, TeacherError
from stillroom.pipeline.teacher.rows import ROUNDING, RowSpec, draw_key
from stillroom.pipeline.teacher.sweep import blocks
from stillroom.pipeline.teacher.sweep.blocks import (
    CPU_ROWS,
    check_sweep,
    rows_within,
    score_rows,
    sweep_name,
    sweep_of,
    usual_scratch_bytes,
)
from stillroom.pipeline.teacher.sweep.definition import sweep, uniforms

NAMES = os.environ.get("STILLROOM_TEST_SWEEPS", "sweep sweep_cpu").split()
DEVICE = os.environ.get("STILLROOM_TEST_DEVICE", "cpu")
HOMES = {"sweep_cpu": "cpu", "sweep_triton": "gpu"}
FAST = [
    getattr(import_module(f"stillroom.pipeline.teacher.sweep.{HOMES[name]}"), name)
    for name in NAMES
    if name != "sweep"
]
SWEEPS = pytest.mark.parametrize("run", [sweep] * ("sweep" in NAMES) + FAST)
KEPT = pytest.mark.parametrize("k", [8, 0])
TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
SLACK = 2.0**-20
"""Relative error of fp32 exponentials and their sums: that of an exponent of size 16, rounded."""


def rows_of(num_rows: int, vocab_size: int, dtype=torch.float32, scale: float = 3.0, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, vocab_size, generator=generator).mul(scale).to(dtype)
    targets = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    return logits, targets, torch.arange(num_rows) + 5


def said(run, logits, targets, positions, spec: RowSpec, key: int = 99) -> dict[str, np.ndarray]:
    asked = (tensor.to(DEVICE) for tensor in (logits, targets, positions))
    ints, floats = run(*asked, key, spec)
    assert ints.dtype == torch.int32
    assert floats.dtype == torch.float32
    return spec.unpack(ints.cpu().numpy(), floats.cpu().numpy())


def dense(logits: torch.Tensor, targets: torch.Tensor, spec: RowSpec) -> dict[str, np.ndarray]:
    """Every deterministic signal in float64, written from its meaning."""
    z = logits.double().numpy()
    order = np.lexsort((np.broadcast_to(np.arange(z.shape[1]), z.shape), -z), axis=1)[:, : spec.k]
    lse = np.stack([_lse(z / t) for t in spec.temperatures], axis=1)
    logp = z - _lse(z)[:, None]
    p, rows = np.exp(logp), np.arange(len(z))
    outside = np.ones_like(z, dtype=bool)
    np.put_along_axis(outside, order, False, axis=1)
    mean, std = z.mean(1), z.std(1)
    return {
        "topk_ids": order,
        "topk_logprobs": np.take_along_axis(logp, order, axis=1),
        "tail_logprob": np.log((p * outside).sum(1)),
        "token_logprob": logp[rows, targets],
        "token_rank": 1 + (z > z[rows, targets][:, None]).sum(1),
        "lse": lse,
        "entropy": -(p * logp).sum(1),
        "logit_mean": mean,
        "logit_std": std,
        "zscore_lse": _lse((z - mean[:, None]) / (1e-7 + std[:, None])),
    }


def _lse(z: np.ndarray) -> np.ndarray:
    peak = z.max(axis=1)
    return peak + np.log(np.exp(z - peak[:, None]).sum(axis=1))


def assert_same(found: dict, expected: dict, tolerance: float = 2e-5) -> None:
    for name, array in expected.items():
        if array.dtype.kind in "iu":
            np.testing.assert_array_equal(found[name], array, err_msg=name)
        else:
            np.testing.assert_allclose(found[name], array, atol=tolerance, rtol=1e-5, err_msg=name)


@SWEEPS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("num_rows", "vocab_size", "k"),
    [
        (3, 768, 16),
        (2, 1000, 512),
        (3, 49_152, 64),
        (1, 151_936, 64),
        (2, 65, 64),
        (2, 2, 1),
        (3, 9, 0),
    ],
)
def test_signals_are_what_they_mean(run, num_rows, vocab_size, k, dtype):
    spec = RowSpec(k, 3, TEMPERATURES, True, True, 0)
    logits, targets, positions = rows_of(num_rows, vocab_size, dtype)
    found = said(run, logits, targets, positions, spec)
    assert_same(found, dense(logits, targets, spec))


@SWEEPS
@settings(max_examples=10 if NAMES == ["sweep_triton"] else 40, deadline=None)
@given(
    vocab_size=st.integers(32, 3000),
    share=st.floats(0, 1),
    scale=st.floats(0.1, 30.0),
    ties=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_signals_are_what_they_mean_for_any_shape(run, vocab_size, share, scale, ties, seed):
    spec = RowSpec(min(512, int(share * (vocab_size - 1))), 2, TEMPERATURES, True, True, 0)
    logits, targets, positions = rows_of(2, vocab_size, scale=scale, seed=seed)
    logits = logits.round() if ties else logits
    found = said(run, logits, targets, positions, spec)
    tolerance = 1e-4 if scale > 3 else 2e-5
    assert_same(found, dense(logits, targets, spec), tolerance)


@SWEEPS
def test_ties_are_broken_by_id(run):
    logits = torch.tensor([[0.0, -0.0, 1.0, 1.0, 0.0, 1.0, -1.0, 0.0]])
    spec = RowSpec(5, 0, (1.0,), False, False, 0)
    found = said(run, logits, torch.tensor([4]), torch.tensor([0]), spec)
    assert found["topk_ids"].tolist() == [[2, 3, 5, 0, 1]]
    assert found["token_rank"].tolist() == [4]


@SWEEPS
@pytest.mark.parametrize("k", [1, 64, 512])
@pytest.mark.parametrize("shape", ["all equal", "two values", "falling", "rising"])
def test_words_of_the_top_may_lie_anywhere(run, shape, k):
    """Many ties, and all of the top in one corner, are what a search by parts could get wrong."""
    ids = torch.arange(6000)
    rows = {"all equal": ids * 0, "two values": ids % 2, "falling": -ids, "rising": ids}
    spec = RowSpec(k, 3, (0.5, 1.0), True, True, 0)
    asked = rows[shape][None].float() / 1000, torch.tensor([17]), torch.tensor([3])
    found = said(run, *asked, spec)
    assert_same(found, dense(asked[0], asked[1], spec))
    assert not np.isin(found["draw_ids"], found["topk_ids"]).any()


@SWEEPS
@pytest.mark.parametrize("peak", [30.1, 48.3, 74.2, 120.0, 900.0])
def test_a_peaked_row_keeps_its_tail(run, peak):
    """The tail is summed, not one minus the rest: e^-900 survives beside 1."""
    logits = torch.zeros(1, 4097)
    logits[0, 7] = peak
    spec = RowSpec(1, 8, (1.0,), True, False, 0)
    found = said(run, logits, torch.tensor([7]), torch.tensor([0]), spec)
    assert found["tail_logprob"][0] == pytest.approx(np.log(4096) - peak, rel=1e-6)
    assert found["draw_counts"].sum() == 1  # a tail that small gets the least there is
    assert 7 not in found["draw_ids"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@SWEEPS
def test_bad_logits_show(run, bad, dtype):
    logits, targets, positions = rows_of(3, 500, dtype)
    logits[1, 400] = bad
    spec = RowSpec(8, 2, TEMPERATURES, True, True, 0)
    found = said(run, logits, targets, positions, spec)
    finite = np.isfinite(found["entropy"])
    assert finite.tolist() == [True, False, True]


@SWEEPS
def test_draws_do_not_depend_on_the_batch(run):
    spec = RowSpec(8, 16, (1.0,), False, False, 0)
    logits, targets, positions = rows_of(7, 900)
    together = said(run, logits, targets, positions, spec)
    for row in range(7):
        one = slice(row, row + 1)
        alone = said(run, logits[one], targets[one], positions[one], spec)
        assert alone["draw_ids"].tolist() == together["draw_ids"][one].tolist()
        assert alone["draw_counts"].tolist() == together["draw_counts"][one].tolist()


@SWEEPS
def test_every_row_may_have_a_key_of_its_own(run):
    spec = RowSpec(8, 16, (1.0,), True, False, 0)
    logits, targets, positions = rows_of(6, 900)
    keys = torch.tensor([3, 99, 2**62 + 5, 99, 0, 2**63 - 1])
    ints, floats = run(*(t.to(DEVICE) for t in (logits, targets, positions, keys)), spec)
    for row, key in enumerate(keys.tolist()):
        one = slice(row, row + 1)
        asked = (t[one].to(DEVICE) for t in (logits, targets, positions))
        alone = run(*asked, key, spec)
        assert torch.equal(ints[one], alone[0])
        assert torch.equal(floats[one], alone[1])


@KEPT
@SWEEPS
def test_a_draw_is_the_id_at_its_point(run, k):
    """Every point of a row lies in its id's stretch of the tail's running sum, so that all sweeps
    draw the same, but for points within rounding of a boundary."""
    spec = RowSpec(k, 32, (1.0,), False, False, 0)
    logits, targets, positions = rows_of(20, 5000)
    found = said(run, logits, targets, positions, spec)
    share = torch.softmax(logits.double(), 1).numpy()
    np.put_along_axis(share, found["topk_ids"].astype(int), 0.0, axis=1)
    share /= share.sum(axis=1, keepdims=True)
    reached, first = share.cumsum(axis=1), uniforms(positions, 99).numpy()
    for row, (ids, counts) in enumerate(zip(found["draw_ids"], found["draw_counts"])):
        drawn = np.repeat(np.maximum(ids, 0), counts)
        points = (first[row] + np.arange(len(drawn))) / len(drawn)
        assert (points <= reached[row, drawn] + SLACK).all()
        assert (points >= reached[row, drawn] - share[row, drawn] - SLACK).all()


@KEPT
@SWEEPS
def test_draws_are_distinct_rising_ids_of_the_tail(run, k):
    spec = RowSpec(k, 50, (1.0,), False, False, 0)
    logits, targets, positions = rows_of(9, 300)
    found = said(run, logits, targets, positions, spec)
    for top, ids, counts in zip(found["topk_ids"], found["draw_ids"], found["draw_counts"]):
        kept = ids[counts > 0]
        assert (np.diff(kept) > 0).all()
        assert not np.isin(kept, top).any()
        assert (ids[counts == 0] == -1).all()
    mass = np.exp(found["tail_logprob"].astype(float))
    np.testing.assert_array_equal(found["draw_counts"].sum(axis=1), np.ceil(50 * mass - ROUNDING))


@KEPT
@SWEEPS
def test_an_id_is_drawn_its_share_rounded_up_or_down(run, k):
    spec = RowSpec(k, 64, (1.0,), False, False, 0)
    logits, targets, positions = rows_of(9, 300)
    found = said(run, logits, targets, positions, spec)
    p = torch.softmax(logits.double(), 1).numpy()
    np.put_along_axis(p, found["topk_ids"], 0.0, axis=1)
    total = found["draw_counts"].sum(axis=1, keepdims=True)
    for expected, ids, counts in zip(
        p / p.sum(axis=1, keepdims=True) * total, found["draw_ids"], found["draw_counts"]
    ):
        drawn = np.zeros(len(expected))
        drawn[ids[counts > 0]] = counts[counts > 0]
        assert (np.abs(drawn - expected) < 1 + 64 * SLACK).all()


@SWEEPS
def test_another_seed_or_example_draws_otherwise(run):
    keys = {draw_key(seed, example) for seed in (0, 1) for example in ("a" * 32, "b" * 32)}
    assert len(keys) == 4
    spec = RowSpec(4, 16, (1.0,), False, False, 0)
    rows = rows_of(1, 5000, scale=0.5)
    drawn = {tuple(said(run, *rows, spec, key)["draw_ids"][0]) for key in keys}
    assert len(drawn) == 4


@SWEEPS
def test_without_exact_ids_the_tail_is_everything(run):
    found = said(run, *rows_of(5, 3000), RowSpec(0, 4, TEMPERATURES, True, True, 0))
    assert found["topk_ids"].shape == found["topk_logprobs"].shape == (5, 0)
    assert found["topk_ids"].dtype == np.int32
    assert found["topk_logprobs"].dtype == np.float32
    assert (found["tail_logprob"] == 0).all()


@KEPT
@SWEEPS
def test_top_k_and_draws_are_an_unbiased_estimate_of_the_whole(run, k):
    """E[q-hat] = p, id by id, so any gradient linear in p (forward KL's) is unbiased as well."""
    num_seeds, draws = 4000, 12
    spec = RowSpec(k, draws, (1.0,), False, False, 0)
    logits, _, _ = rows_of(1, 24, scale=1.5, seed=3)
    estimates = _estimates(run, logits, spec, num_seeds)
    p = torch.softmax(logits[0].double(), 0).numpy()
    error = estimates.std(axis=0) / np.sqrt(num_seeds)
    assert (np.abs(estimates.mean(axis=0) - p) <= 5 * error + 1e-6).all()


@KEPT
def test_noise_is_below_that_of_draws_with_replacement(k):
    """Against arXiv 2503.16870, which draws n times from all of p. Compared as the variance of the
    forward KL gradient, whose noise is exactly that of the estimate of p."""
    logits, _, _ = rows_of(1, 200, scale=2.0, seed=1)
    p = torch.softmax(logits[0].double(), 0).numpy()
    draws = 32
    ours = _estimates(sweep, logits, RowSpec(k, draws, (1.0,), False, False, 0), 3000)
    theirs = np.random.default_rng(0).multinomial(draws, p, size=3000) / draws
    assert ((theirs - p) ** 2).sum(axis=1).mean() == pytest.approx(
        (1 - (p**2).sum()) / draws, rel=0.1
    )
    assert ((ours - p) ** 2).sum(axis=1).mean() < 0.5 * ((theirs - p) ** 2).sum(axis=1).mean()


def _estimates(run, logits: torch.Tensor, spec: RowSpec, num_seeds: int) -> np.ndarray:
    """[seeds, V]: exact top-k plus the tail's mass dealt out by the draws; a row is a seed."""
    many = logits.expand(num_seeds, -1).contiguous()
    found = said(run, many, torch.zeros(num_seeds, dtype=torch.long), torch.arange(num_seeds), spec)
    out = np.zeros(many.shape)
    np.put_along_axis(out, found["topk_ids"].astype(int), np.exp(found["topk_logprobs"]), axis=1)
    shares = found["draw_counts"] / found["draw_counts"].sum(axis=1, keepdims=True)
    weight = np.exp(found["tail_logprob"])[:, None] * shares
    np.add.at(
        out,
        (np.arange(num_seeds)[:, None], np.maximum(found["draw_ids"], 0)),
        np.where(found["draw_ids"] >= 0, weight, 0.0),
    )
    return out


def test_blocks_change_nothing():
    """The head's product is in float64: in float32 its sums would depend on the rows in a block."""
    spec = RowSpec(8, 4, TEMPERATURES, True, True, 0)
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(300, 16, generator=generator).double()
    hidden = torch.randn(50, 16, generator=generator).double()
    targets = torch.randint(0, 300, (50,), generator=generator)

    def scored(block_rows: int) -> dict[str, np.ndarray]:
        logits = lambda h: (h @ head.T).float()  # noqa: E731
        keys = torch.ones(50, dtype=torch.int64)
        asked = targets, torch.arange(9, 59), keys, logits, block_rows, False
        ints, floats = score_rows(spec, [50], lambda a, b: hidden[a:b], *asked)
        return spec.unpack(ints.numpy(), floats.numpy())

    whole, pieces = scored(50), scored(7)
    for name in whole:
        np.testing.assert_allclose(pieces[name], whole[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("device", "dtype", "sweep_bytes"),
    [("cuda", torch.bfloat16, 4), ("cuda", torch.float32, 8), ("xpu", torch.float32, 44)],
)
def test_block_rows_fit_the_bound(device, dtype, sweep_bytes):
    bound, spec = 1 << 30, RowSpec(64, 16, TEMPERATURES, True, True, 0)
    assert rows_within(bound, 151_936, "cpu", spec, dtype) == CPU_ROWS
    assert rows_within(1, 151_936, device, spec, dtype) == 1
    rows = rows_within(bound, 151_936, device, spec, dtype)
    assert 0.7 * bound < rows * 151_936 * sweep_bytes <= bound
    assert rows % 128 == 0


def test_a_small_bound_leaves_less_than_a_tile():
    spec = RowSpec(64, 16, TEMPERATURES, True, True, 0)
    assert 1 < rows_within(16 << 20, 151_936, "cuda", spec, torch.bfloat16) < 128


def test_a_large_card_may_hold_more_logits():
    sizes = [usual_scratch_bytes(gb * 10**9) >> 20 for gb in (0, 24, 48, 80, 141)]
    assert sizes == [256, 256, 256, 1024, 1024]


def test_the_sweep_follows_from_the_device_or_is_named(monkeypatch):
    assert [sweep_name(device) for device in ("cpu", "cuda", "xpu")] == ["numba", "triton", "torch"]
    monkeypatch.setenv("STILLROOM_SWEEP", "torch")
    assert sweep_of("cuda") is sweep
    monkeypatch.setenv("STILLROOM_SWEEP", "tirton")
    with pytest.raises(ConfigError, match=r"STILLROOM_SWEEP: no sweep is named 'tirton'.*triton"):
        sweep_of("cuda")


def test_a_sweep_that_errs_is_refused_before_it_is_used(monkeypatch):
    spec = RowSpec(8, 2, TEMPERATURES, True, True, 0)
    check_sweep(3000, "cpu", spec)

    def wrong(*asked):
        ints, floats = sweep(*asked)
        return ints, floats + 0.01

    monkeypatch.setattr(blocks, "sweep_of", lambda _: wrong)
    with pytest.raises(TeacherError, match=r"numba sweep is off by 0\.01 and in 0 ids.*=torch"):
        check_sweep(3000, "cpu", spec)


def test_a_sweep_is_checked_on_what_engines_hand_over(monkeypatch):
    """bf16 rows of a wider buffer, whose spare columns say nothing, from flat to peaked."""
    spec, seen = RowSpec(8, 2, TEMPERATURES, True, True, 0), []

    def listening(logits, *asked):
        seen.append(logits)
        return sweep(logits, *asked)

    monkeypatch.setattr(blocks, "sweep_of", lambda _: listening)
    check_sweep(3001, "cpu", spec)
    (logits,) = seen
    assert logits.dtype == torch.bfloat16
    assert logits.stride() == (3008, 1)
    largest = logits.abs().amax(1).tolist()
    assert largest[0] < 6
    assert largest[-1] > 60


@pytest.mark.parametrize(("row", "off", "refused"), [(0, 4e-4, True), (3, 4e-4, False)])
def test_what_a_sweep_may_be_off_by_follows_the_logits(monkeypatch, row, off, refused):
    """4e-4 is many roundings of a flat row's numbers and few of a row with logits of 100."""
    spec = RowSpec(8, 2, TEMPERATURES, True, True, 0)

    def wrong(*asked):
        ints, floats = sweep(*asked)
        floats[row] += off
        return ints, floats

    monkeypatch.setattr(blocks, "sweep_of", lambda _: wrong)
    if refused:
        with pytest.raises(TeacherError, match=r"is off by 0\.0004 .*at most 0\.000\d+ from"):
            check_sweep(3000, "cpu", spec)
    else:
        check_sweep(3000, "cpu", spec)
