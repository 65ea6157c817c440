"""Opening and resuming a cache of 100 billion tokens asks for little."""

import pytest

from benchmarks.cache_scale import EXAMPLES, TOKENS, Simulated
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.cache.writer import CacheWriter
from tests.synthetic_records import make_plan


@pytest.fixture(scope="module")
def storage():
    return Simulated(make_plan(EXAMPLES * 40_000, EXAMPLES, TOKENS))


def test_opening_reads_the_manifest_and_nothing_else(storage):
    storage.requests = 0
    cache = TeacherCache.open(storage)
    assert len(cache) == 97_680_000
    assert cache.shard_of(97_679_999) == 39_999
    assert storage.requests <= 3


@pytest.mark.parametrize("rank", [0, 7, 63])
def test_a_workers_resume_check_lists_only_its_own_folders(storage, rank):
    storage.requests = 0
    missing = CacheWriter(storage, storage.plan, None).missing(rank, 64)
    assert len(missing) in (62, 63)
    assert storage.requests <= 4
