"""An opened cache travels to other processes, as a DataLoader with spawned workers sends it."""

import pickle

import numpy as np
import pytest
from torch.utils.data import DataLoader

from stillroom.pipeline.cache.reader import TeacherCache
from tests import memory_cache


@pytest.fixture(scope="module")
def stored(tmp_path_factory, tiny_llama):
    texts = memory_cache.examples(9)
    captured = memory_cache.captured(tiny_llama, texts, profile="small", hidden_layers=("final",))
    return captured.write(tmp_path_factory.mktemp("cache") / "cache")


def first_ids(records):
    return [record.signals["topk_ids"] for record in records]


@pytest.mark.parametrize("far", [False, True])
def test_a_cache_is_pickled_by_where_it_lies(stored, tmp_path, far):
    where = f"file://{stored}" if far else stored
    cache = TeacherCache.open(where, str(tmp_path / "local") if far else "")
    cache.read(0)
    again = pickle.loads(pickle.dumps(cache))
    for number in range(len(cache)):
        for name, array in cache[number].signals.items():
            np.testing.assert_array_equal(again[number].signals[name], array)


def test_spawned_workers_read_it(stored):
    cache = TeacherCache.open(stored)
    loader = DataLoader(
        cache, batch_size=3, num_workers=1, collate_fn=first_ids, multiprocessing_context="spawn"
    )
    found = [ids for batch in loader for ids in batch]
    assert len(found) == len(cache)
    for ids, record in zip(found, cache, strict=True):
        np.testing.assert_array_equal(ids, record.signals["topk_ids"])
