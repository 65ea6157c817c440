"""Caches of every released format version are read for ever."""

from pathlib import Path

import numpy as np
import pytest
import zarr

from stillroom.pipeline.cache.care.verification import verify
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.cache.storage.directory import DirectoryStorage
from tests.codec_samples import assert_decoded
from tests.golden.make_cache_fixtures import PLANS, flat

HERE = Path(__file__).parent
CACHES = sorted(path for path in HERE.glob("cache-v*/*") if path.is_dir())


def test_there_are_fixtures_of_version_1():
    assert {path.name for path in CACHES if path.parent.name == "cache-v1"} == set(PLANS)


@pytest.mark.parametrize("path", CACHES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_golden_cache_is_sound_and_reads_as_it_did(path):
    assert verify(DirectoryStorage(path)).problems == []
    found = flat(TeacherCache.open(path))
    with np.load(path.with_suffix(".npz")) as expected:
        assert_decoded(found, expected)


def test_dense_signals_open_as_an_ordinary_zarr_array():
    path = HERE / "cache-v1" / "portable"
    array = zarr.open_array(str(path / "dense" / "hidden.2"), mode="r")
    assert array.attrs["dtype"] == "bfloat16"
    for number, record in enumerate(TeacherCache.open(path)):
        expected = record.signals["hidden.2"]
        bits = np.asarray(array[number])[: len(expected)].astype(np.uint32) << 16
        np.testing.assert_array_equal(bits.view(np.float32), expected)
