"""Kill, full disk, power loss and flipped bits: nothing committed is lost, nothing is silent.

The whole counts (2,000 flips, 200 kills, 50 full disks) run in `benchmarks.cache_faults`.
"""

import errno
import os
import random
import signal
import threading

import pytest

from stillroom.cache_schemas import layout
from stillroom.cache_schemas.errors import CacheIncomplete
from stillroom.pipeline.cache.card import README
from stillroom.pipeline.cache.care.verification import verify
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.cache.storage.directory import DirectoryStorage
from stillroom.pipeline.cache.storage.disk import Disk
from stillroom.pipeline.cache.writer import CacheWriter
from tests import cache_trials as trials
from tests.synthetic_records import records_of


@pytest.fixture(scope="module")
def plan():
    return trials.small_plan()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, plan):
    root = tmp_path_factory.mktemp("whole") / "cache"
    trials.write(root, plan)
    return root


@pytest.fixture(scope="module")
def expected(whole):
    return trials.contents(whole)


@pytest.fixture(scope="module")
def operations(tmp_path_factory, plan):
    """Disk operations of one whole run."""
    disk = trials.full(1 << 40)
    trials.write(tmp_path_factory.mktemp("counted") / "cache", plan, disk)
    return disk.count


def some(count, of, seed):
    return sorted(random.Random(seed).sample(range(of), min(count, of)))


def test_killed_anywhere_the_seal_is_the_same(tmp_path, plan, expected, operations):
    for at in some(8, operations, seed=1):
        root = tmp_path / str(at)
        assert trials.killed(root, plan, at)
        assert trials.contents(root) == expected


def test_a_full_disk_anywhere_loses_nothing(tmp_path, plan, expected, operations):
    for at in some(12, operations, seed=2):
        root = tmp_path / str(at)
        assert trials.filled(root, plan, at)
        assert trials.contents(root) == expected


def test_power_lost_anywhere_loses_nothing_that_was_committed(tmp_path, plan, expected, operations):
    for at in some(12, operations, seed=3):
        root = tmp_path / str(at)
        assert trials.powered_off(root, plan, at, seed=at)
        assert trials.contents(root) == expected


def test_no_flipped_bit_is_silent(whole, expected):
    records, choice = list(TeacherCache.open(whole)), random.Random(4)
    undetected = []
    for _ in range(100):
        name, bit = trials.flip_bit(whole, expected, choice)
        by_verify = trials.is_found_by_verify(whole)
        by_reading = trials.is_found_by_reading(whole, records)
        if not by_verify:
            assert not by_reading
            undetected.append((name, bit))
        (whole / name).write_bytes(expected[name])
    assert {name for name, _ in undetected} <= {README, layout.PLAN, layout.CODEC}


def test_two_writers_of_one_shard_leave_one_and_both_return_its_receipt(tmp_path, plan):
    first, second = (CacheWriter.open(tmp_path, plan) for _ in range(2))
    first.fit(records_of(plan, 0))
    barrier, receipts = threading.Barrier(2), {}

    def work(writer, seed):
        barrier.wait()
        receipts[seed] = writer.write(1, records_of(plan, 1, seed))

    threads = [threading.Thread(target=work, args=pair) for pair in ((first, 0), (second, 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert receipts[0] == receipts[1]
    assert verify(first.storage).problems == []


def test_two_fits_end_with_one_table(tmp_path, plan):
    writers = [CacheWriter.open(tmp_path, plan) for _ in range(2)]
    writers[0].fit(records_of(plan, 0))
    writers[1].fit(records_of(plan, 1))
    codecs = [writer.storage.read(layout.CODEC) for writer in writers]
    assert codecs[0] == codecs[1]
    for shard in range(plan.num_shards):
        writers[shard % 2].write(shard, records_of(plan, shard))
    writers[0].seal()
    assert verify(writers[0].storage).problems == []


def test_a_reader_beside_a_writer_sees_nothing_or_all(tmp_path, plan):
    writer = CacheWriter.open(tmp_path, plan)
    writer.begin()
    for shard in range(plan.num_shards):
        with pytest.raises(CacheIncomplete):
            TeacherCache.open(tmp_path)
        writer.write(shard, records_of(plan, shard))
    writer.seal()
    assert len(list(TeacherCache.open(tmp_path))) == plan.num_examples


class NetworkDisk(Disk):
    """Carries out a link or rename, loses the answer, and reports a failure, as NFS may."""

    def link(self, source, target):
        super().link(source, target)
        raise FileExistsError(errno.EEXIST, "retransmitted", str(target))


class NoLinks(Disk):
    """A file system without hard links."""

    def link(self, source, target):
        if target.exists():
            raise FileExistsError(errno.EEXIST, "exists", str(target))
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(target))


@pytest.mark.parametrize("disk", [NetworkDisk(), NoLinks()])
def test_odd_file_systems_give_the_same_cache(tmp_path, plan, expected, disk):
    trials.write(tmp_path / "cache", plan, disk)
    assert trials.contents(tmp_path / "cache") == expected


def test_leftovers_of_the_dead_are_swept_and_those_of_the_living_kept(tmp_path, plan):
    storage = DirectoryStorage(tmp_path)
    dead = tmp_path / layout.STAGING / "deadbeefdeadbeef"
    dead.mkdir(parents=True)
    (dead / "file").write_bytes(b"half")
    with storage.staging() as mine:
        storage.sweep()
        assert [path.name for path in (tmp_path / layout.STAGING).iterdir()] == [mine.name]
    assert not (tmp_path / layout.STAGING).exists()


def test_two_workers_of_one_share_do_not_score_the_same_shard(tmp_path, plan):
    first, second = (CacheWriter.open(tmp_path, plan) for _ in range(2))
    first.fit(records_of(plan, 0))
    mine, theirs = first.unclaimed(first.missing()), second.unclaimed(second.missing())
    assert (next(mine), next(theirs), next(mine)) == (0, 1, 2)
    first.write(0, records_of(plan, 0))
    assert list(theirs) == [3]
    first.release()
    assert list(second.unclaimed(second.missing())) == [1, 2, 3]


def test_a_dead_workers_claim_is_free_at_once(tmp_path, plan):
    def die_with_a_claim():
        next(CacheWriter.open(tmp_path, plan).unclaimed([0]))
        os.kill(os.getpid(), signal.SIGKILL)

    trials.in_child(die_with_a_claim)
    assert (tmp_path / layout.claim(0)).exists()
    assert next(CacheWriter.open(tmp_path, plan).unclaimed([0])) == 0


def test_claims_leave_nothing_in_a_sealed_cache(tmp_path, plan, expected):
    writer = CacheWriter.open(tmp_path, plan)
    writer.fit(records_of(plan, 0))
    for shard in writer.unclaimed(writer.missing()):
        writer.write(shard, records_of(plan, shard))
    writer.seal()
    assert trials.contents(tmp_path) == expected
