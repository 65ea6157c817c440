"""Records and chunks that version 1 wrote decode to the same arrays, now and for ever."""

import json

import numpy as np
import pytest

from stillroom.cache_schemas import dense_codec, row_scaling
from stillroom.cache_schemas.record_codec import RowCodec
from tests.codec_samples import assert_decoded, assert_same, assert_within_bounds
from tests.golden.make_codec_fixtures import DIRECTORY, STEP, hidden, sample


def codec_of(profile: str) -> RowCodec:
    facts = json.loads((DIRECTORY / f"{profile}.json").read_text())
    tables = {name: np.load(DIRECTORY / f"{profile}-{name}.npy") for name in facts["tables"]}
    return RowCodec.from_facts(facts, tables)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("profile", ["exact", "small", "strict"])
def test_records_of_version_1(profile, seed):
    found = codec_of(profile).decode((DIRECTORY / f"{profile}-{seed}.record").read_bytes())
    with np.load(DIRECTORY / f"{profile}-{seed}.npz") as expected:
        assert_decoded(found, expected)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("profile", ["exact", "small", "strict"])
def test_records_of_version_1_hold_what_was_put_in(profile, seed):
    """Against the signals themselves, so that a fixture made by a wrong encoder is found."""
    found = codec_of(profile).decode((DIRECTORY / f"{profile}-{seed}.record").read_bytes())
    if profile == "exact":
        assert_same(found, sample(seed))
    else:
        assert_within_bounds(profile, found, sample(seed))


@pytest.mark.parametrize("form", row_scaling.FORMS)
def test_dense_chunks_of_version_1(form):
    blob = (DIRECTORY / f"{form}.chunk").read_bytes()
    found = row_scaling.decode(blob, 20, 16, form, STEP)
    np.testing.assert_array_equal(found, np.load(DIRECTORY / f"{form}.npy"))
    assert (np.abs(found - hidden()) <= 0.07 * np.abs(hidden()).max(axis=1, keepdims=True)).all()


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_dense_dtypes_of_version_1(name):
    stored = np.load(DIRECTORY / f"{name}.npy")
    np.testing.assert_array_equal(dense_codec.to_stored({"name": name}, hidden()), stored)
    found = dense_codec.from_stored({"name": name}, stored)
    assert (np.abs(found - hidden()) <= 2.0**-8 * np.abs(hidden())).all()
