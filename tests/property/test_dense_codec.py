"""Dense codecs: bounds, Zarr chains, and what they refuse."""

import asyncio

import numpy as np
import pytest
import zarr
import zarr.storage
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.cache_schemas import dense_codec, row_scaling
from stillroom.cache_schemas.errors import CacheError

BF16_STEP = 2.0**-8
"""Relative error of rounding to bfloat16, at most."""

arrays = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32 - 1),
        "rows": st.sampled_from([0, 1, 2, 33]),
        "width": st.sampled_from([1, 2, 7, 8, 65]),
        "scale": st.sampled_from([1e-30, 1e-3, 1.0, 1e4, 1e30]),
        "kind": st.sampled_from(["normal", "massive", "zeros", "constant", "offset"]),
    }
)


def hidden(seed: int, rows: int, width: int, scale: float, kind: str) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, width))
    if kind == "massive" and rows:
        x[0] *= 200
        x[0, 0] *= 25
    if kind == "zeros":
        x[rows // 2 :] = 0
    if kind == "constant":
        x[:] = 1
    if kind == "offset":
        x += np.linspace(-50, 50, width)
    return (x * scale).astype(np.float32)


def largest(rows: np.ndarray) -> np.ndarray:
    return np.abs(rows).max(axis=1, keepdims=True, initial=0)


@settings(max_examples=80, deadline=None)
@given(spec=arrays, step=st.sampled_from([0.016, 0.05, 0.2]))
def test_steps_stay_within_half_a_step_of_the_rows_rms(spec, step):
    rows = hidden(**spec).astype(np.float64)
    found = row_scaling.decode(
        row_scaling.encode(rows.astype(np.float32), "step", step), *rows.shape, "step", step
    )
    rms = np.sqrt((rows**2).mean(axis=1, keepdims=True))
    assert (np.abs(found - rows) <= (step * rms / 2 + 2.0**-22 * np.abs(rows)) * 1.00001).all()


@settings(max_examples=80, deadline=None)
@given(spec=arrays)
def test_int8_and_fp8_stay_within_their_bounds(spec):
    rows = hidden(**spec)
    int8, fp8 = (
        row_scaling.decode(row_scaling.encode(rows, form, 0.0), *rows.shape, form, 0.0)
        for form in ("int8", "fp8")
    )
    assert (np.abs(int8 - rows) <= largest(rows) / 252 * 1.00001).all()
    bound = np.maximum(np.abs(rows) / 16, largest(rows) * 2.0**-18)
    assert (np.abs(fp8 - rows) <= bound * 1.00001).all()


def test_the_normalised_error_of_steps_is_a_twelfth_of_the_step_squared():
    rows = hidden(0, 400, 576, 1.0, "massive")
    for step in (0.016, 0.05, 0.1):
        found = row_scaling.decode(row_scaling.encode(rows, "step", step), 400, 576, "step", step)
        relative = ((found - rows) ** 2).sum(axis=1) / (rows**2).sum(axis=1)
        assert relative[1:].mean() == pytest.approx(step**2 / 12, rel=0.02)


def test_groups_of_channels_cost_less_than_one_code_for_all():
    """Channels whose spreads differ a thousandfold, against the entropy of all steps together."""
    rows = hidden(0, 500, 64, 1.0, "normal") * np.logspace(-3, 0, 64, dtype=np.float32)
    rms = np.sqrt((rows**2).mean(axis=1, keepdims=True))
    counts = np.unique(np.rint(rows / (0.05 * rms)), return_counts=True)[1] / rows.size
    one_code = -(counts * np.log2(counts)).sum()
    assert len(row_scaling.encode(rows, "step", 0.05)) * 8 / rows.size < 0.85 * one_code


@pytest.mark.parametrize("name", dense_codec.NAMES)
def test_zarr_arrays_round_trip_through_shards(name):
    codec = {"name": name, "step": 0.05}
    rows = np.stack([hidden(seed, 12, 8, 1.0, "massive") for seed in range(5)])
    rows[1, 6:] = 0
    store = zarr.storage.MemoryStore()
    array = zarr.create_array(
        store=store,
        shape=(5, 12, 8),
        chunks=(1, 12, 8),
        shards=(2, 12, 8),
        **dense_codec.chain(codec),
    )
    array[...] = dense_codec.to_stored(codec, rows)
    reopened = zarr.open_array(store, mode="r")
    found = dense_codec.from_stored(codec, np.asarray(reopened[...]))
    assert found.dtype == np.float32
    bound = {"step": 0.1, "int8": 0.01, "fp8": 0.07}.get(name, BF16_STEP)
    peak = np.abs(rows).max(axis=2, keepdims=True) if name == "int8" else np.abs(rows)
    rms = np.sqrt((rows.astype(np.float64) ** 2).mean(axis=2, keepdims=True))
    assert (np.abs(found - rows) <= bound * np.maximum(peak, rms)).all()
    assert (found[1, 6:] == 0).all()


@pytest.mark.parametrize("name", dense_codec.NAMES)
def test_a_flipped_bit_of_a_chunk_is_an_error(name):
    codec = {"name": name, "step": 0.05}
    store = zarr.storage.MemoryStore()
    array = zarr.create_array(
        store=store, shape=(1, 12, 8), chunks=(1, 12, 8), **dense_codec.chain(codec)
    )
    array[...] = dense_codec.to_stored(codec, hidden(0, 12, 8, 1.0, "normal")[None])
    whole = asyncio.run(store.get("c/0/0/0", zarr.core.buffer.default_buffer_prototype()))
    assert whole is not None
    for bit in range(0, 8 * len(whole), 61):
        flipped = bytearray(whole.to_bytes())
        flipped[bit // 8] ^= 1 << bit % 8
        buffer = zarr.core.buffer.cpu.Buffer.from_bytes(bytes(flipped))
        asyncio.run(store.set("c/0/0/0", buffer))
        with pytest.raises((ValueError, CacheError)):
            zarr.open_array(store, mode="r")[...]


def test_bfloat16_values_are_stored_exactly():
    codec = {"name": "bf16", "step": 0.0}
    rows = hidden(0, 50, 33, 1.0, "massive")
    exact = dense_codec.from_stored(codec, dense_codec.to_stored(codec, rows))
    assert (np.abs(exact - rows) <= BF16_STEP * np.abs(rows)).all()
    np.testing.assert_array_equal(
        dense_codec.from_stored(codec, dense_codec.to_stored(codec, exact)), exact
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", dense_codec.NAMES)
def test_values_that_are_not_finite_are_refused(name, value):
    with pytest.raises(CacheError, match="not finite"):
        dense_codec.to_stored({"name": name, "step": 0.05}, np.array([[1.0, value]], np.float32))


def test_a_value_that_fp16_cannot_hold_is_refused():
    with pytest.raises(CacheError, match="65504"):
        dense_codec.to_stored({"name": "fp16"}, np.array([[70000.0]], np.float32))


def test_an_unknown_codec_is_refused():
    with pytest.raises(CacheError, match="one of bf16"):
        dense_codec.chain({"name": "int3"})
