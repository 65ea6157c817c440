"""Trials that damage or interrupt the writing of a small cache; shared by tests and benchmark.

One idea: every trial ends with the same question: is what is left the cache that an uninterrupted
run gives, bit for bit, or a clear refusal?
"""

import random
from pathlib import Path

from stillroom.cache_schemas.errors import StillroomError
from stillroom.cache_schemas.manifest import Plan
from stillroom.pipeline.cache.care.verification import verify
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.cache.storage.directory import DirectoryStorage
from stillroom.pipeline.cache.storage.disk import Disk
from stillroom.pipeline.cache.writer import CacheWriter
from stillroom.pipeline.record import TeacherRecord
from tests.faulty_disk import PowerLoss, VolatileDisk, full, in_child, killing
from tests.synthetic_records import assert_same_record, make_plan, records_of


def small_plan(profile: str = "small") -> Plan:
    """Four shards with a dense signal, quick to write."""
    return make_plan(num_examples=7, per_shard=2, max_tokens=12, profile=profile, hidden_layers=[2])


def write(root: Path, plan: Plan, disk: Disk | None = None) -> list[int]:
    """Write what is missing and seal; the shards that were written."""
    writer = CacheWriter.open(DirectoryStorage(root, disk), plan)
    if writer.needs_fit:
        writer.fit(records_of(plan, 0))
    missing = writer.missing()
    for shard in missing:
        writer.write(shard, records_of(plan, shard))
    writer.seal()
    return missing


def contents(root: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def restore(root: Path, expected: dict[str, bytes]) -> None:
    """Put every file back."""
    for name, data in expected.items():
        if (root / name).read_bytes() != data:
            (root / name).write_bytes(data)


def receipts(root: Path) -> int:
    """How many shards are committed."""
    return len(list(root.glob("receipts/*/*.json")))


def killed(root: Path, plan: Plan, at: int) -> bool:
    """Kill a writer before disk operation `at`, then finish; False if it ended before that."""
    status = in_child(lambda: (write(root, plan, killing(at)), None)[1])
    return resume(root, plan) if status == 9 else False


def filled(root: Path, plan: Plan, at: int) -> bool:
    """Run out of space at disk operation `at`, then finish with space; False as for `killed`."""
    try:
        write(root, plan, full(at))
    except OSError:
        return resume(root, plan)
    return False


def powered_off(root: Path, plan: Plan, at: int, seed: int) -> bool:
    """Lose power before disk operation `at`, then finish; False as for `killed`."""
    disk = VolatileDisk(at)
    try:
        write(root, plan, disk)
    except PowerLoss:
        disk.lose_power(root, random.Random(seed))
        return resume(root, plan)
    return False


def resume(root: Path, plan: Plan) -> bool:
    """Finish what was interrupted; only what had no receipt is done again."""
    committed = receipts(root)
    written = write(root, plan)
    assert len(written) == plan.num_shards - committed
    return True


def flip_bit(root: Path, before: dict[str, bytes], choice: random.Random) -> tuple[str, int]:
    """Flip one bit of one file, all bits of the cache being equally likely."""
    names = sorted(before)
    name = choice.choices(names, weights=[len(before[n]) for n in names])[0]
    bit = choice.randrange(8 * len(before[name]))
    data = bytearray(before[name])
    data[bit // 8] ^= 1 << bit % 8
    (root / name).write_bytes(data)
    return name, bit


def is_found_by_verify(root: Path) -> bool:
    """True if verification objects."""
    try:
        return bool(verify(DirectoryStorage(root)).problems)
    except StillroomError:
        return True


def is_found_by_reading(root: Path, expected: list[TeacherRecord]) -> bool:
    """True if reading everything is refused; False if every record is what was written.

    Raises:
        AssertionError: a record differs and nobody objected.
    """
    try:
        cache = TeacherCache.open(root)
        found = list(cache)
        index = cache.index(["example_id", "num_tokens"]).to_pylist()
    except StillroomError:
        return True
    for mine, theirs, entry in zip(found, expected, index, strict=True):
        assert_same_record(mine, theirs)
        assert entry["example_id"] == theirs.example.example_id
        assert entry["num_tokens"] == len(theirs.example.token_ids)
    return False
