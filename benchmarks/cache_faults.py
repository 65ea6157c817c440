"""Damage and interruption in the full counts that the format promises to survive.

    python -m benchmarks.cache_faults --json

1,000 flipped bits anywhere in a sealed cache: found by `verify`, or harmless because every record
still reads as it was written; the training path is tried as well. 1,000 values changed at random
with every checksum above them redone: found by `verify`, or still sense. (A value that makes sense
and is not the teacher's own cannot be told from one that is; these are counted by themselves.)
200 processes killed with SIGKILL at random moments of writing, 50 full disks, 50 power losses: the
cache that the same command then seals must be bit for bit the one of an uninterrupted run, and only
shards without a receipt may be written again. The trials of `tests/cache_trials.py` raise when one
fails.
"""

import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

from benchmarks import needs
from benchmarks.cache_trial import asking, publish
from stillroom.cache_schemas.errors import CacheError
from stillroom.pipeline.cache.reader import TeacherCache
from tests import cache_trials as trials
from tests import hostile_caches
from tests.faulty_disk import full


def flips(root: Path, plan, count: int, seed: int) -> dict:
    """Outcome of flipped bits, one at a time."""
    trials.write(root, plan)
    expected = trials.contents(root)
    records, choice = list(TeacherCache.open(root)), random.Random(seed)
    outcome = {"detected": 0, "harmless": 0, "refused_by_reader": 0, "silent": 0}
    for _ in range(count):
        name, _ = trials.flip_bit(root, expected, choice)
        found = trials.is_found_by_verify(root)
        try:
            outcome["refused_by_reader"] += trials.is_found_by_reading(root, records)
        except AssertionError:
            outcome["silent"] += 1
        outcome["detected" if found else "harmless"] += 1
        (root / name).write_bytes(expected[name])
    return outcome


def consistent(root: Path, plan, count: int, seed: int) -> dict:
    """Outcome of changed values whose checksums were redone, one at a time."""
    trials.write(root, plan)
    expected, choice = trials.contents(root), random.Random(seed)
    outcome = {"detected": 0, "makes_sense": 0, "not_writable": 0, "silent": 0}
    kinds: dict[str, int] = {}
    for _ in range(count):
        name = choice.choice(sorted(hostile_caches.DAMAGES))
        number = choice.randrange(plan.num_examples)
        try:
            hostile_caches.DAMAGES[name](root, number, choice)
        except (CacheError, ValueError):  # the codec itself refuses such a value
            outcome["not_writable"] += 1
            trials.restore(root, expected)
            continue
        found = trials.is_found_by_verify(root)
        nonsense = name in hostile_caches.NONSENSE
        kind = "detected" if found else "silent" if nonsense else "makes_sense"
        outcome[kind] += 1
        kinds[f"{name}: {kind}"] = kinds.get(f"{name}: {kind}", 0) + 1
        trials.restore(root, expected)
    return outcome | {"kinds": dict(sorted(kinds.items()))}


def kills(folder: Path, plan, expected: dict, count: int, seed: int) -> dict:
    """SIGKILL at random moments of wall-clock time."""
    choice, survived, redone = random.Random(seed), 0, [0]
    started = time.perf_counter()
    _killed_after(folder / "timed", plan, None)
    longest = time.perf_counter() - started
    for trial in range(count):
        root = folder / f"kill{trial}"
        if not _killed_after(root, plan, choice.random() * longest):
            survived += 1
        committed = trials.receipts(root)
        staged = len(list(root.glob("rows/*/*.arrow"))) - committed
        redone.append(staged)
        trials.resume(root, plan)
        assert trials.contents(root) == expected, trial
        shutil.rmtree(root)
    return {"killed": count - survived, "ended_before": survived, "most_half_done": max(redone)}


def _killed_after(root: Path, plan, seconds: float | None) -> bool:
    """True if the writer was still at work after so many seconds; None lets it finish."""
    child = os.fork()
    if child == 0:
        try:
            trials.write(root, plan)
            os._exit(0)
        finally:
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def at_operations(folder: Path, plan, expected: dict, count: int, trial) -> dict:
    """A fault before `count` of the writer's disk operations, evenly spaced."""
    counter = full(1 << 40)
    trials.write(folder / "counted", plan, counter)
    done = 0
    for number in range(count):
        root = folder / f"op{number}"
        done += trial(root, plan, number * counter.count // count)
        assert trials.contents(root) == expected, number
        shutil.rmtree(root)
    return {"trials": done, "disk_operations_of_a_run": counter.count}


def main() -> None:
    """Measure and print."""
    parser = asking(__doc__)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--consistent", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--others", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    plan = trials.small_plan()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        trials.write(folder / "whole", plan)
        expected = trials.contents(folder / "whole")
        sizes = {"cache_bytes": sum(map(len, expected.values())), "files": len(expected)}
        powered_off = lambda root, plan, at: trials.powered_off(root, plan, at, seed=at)  # noqa: E731
        result = {
            **sizes,
            "flips": flips(folder / "flips", plan, options.flips, options.seed),
            "consistent": {
                profile: consistent(
                    folder / profile,
                    trials.small_plan(profile),
                    options.consistent // 2,
                    options.seed,
                )
                for profile in ("small", "exact")
            },
            "kills": kills(folder, plan, expected, options.kills, options.seed),
            "full_disks": at_operations(
                folder / "full", plan, expected, options.others, trials.filled
            ),
            "power_losses": at_operations(
                folder / "power", plan, expected, options.others, powered_off
            ),
        }
    publish("cache_faults", result, options.json)


if __name__ == "__main__":
    needs.run(main)
