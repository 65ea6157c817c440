"""Caches of every released format version are read for ever, and `portable` by anyone."""

from pathlib import Path

import numpy as np
import pytest
import zarr

from stillroom.pipeline.cache.care.verification import verify
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.cache.storage.directory import DirectoryStorage
from tests.codec_samples import assert_decoded
from tests.golden.make_cache_fixtures import PLANS, flat
from tests.golden.mini_reader import read_cache

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


def test_a_reader_written_from_the_page_reads_the_portable_profile():
    path = HERE / "cache-v1" / "portable"
    ours = list(TeacherCache.open(path))
    for found, expected in zip(read_cache(path), ours, strict=True):
        assert found["example_id"] == expected.example.example_id
        assert found["first_row"] == expected.first_row
        np.testing.assert_array_equal(found["token_ids"], expected.example.token_ids)
        np.testing.assert_array_equal(found["loss_mask"], expected.example.loss_mask)
        for name in TeacherCache.open(path).plan.row_signals:
            np.testing.assert_array_equal(found[name], expected.signals[name], err_msg=name)


def test_dense_signals_open_as_an_ordinary_zarr_array():
    path = HERE / "cache-v1" / "portable"
    array = zarr.open_array(str(path / "dense" / "hidden.2"), mode="r")
    assert array.attrs["dtype"] == "bfloat16"
    for number, record in enumerate(TeacherCache.open(path)):
        expected = record.signals["hidden.2"]
        bits = np.asarray(array[number])[: len(expected)].astype(np.uint32) << 16
        np.testing.assert_array_equal(bits.view(np.float32), expected)
