"""Full disks and kill -9 in every verb that makes a cache from caches, and in repair.

    python -m benchmarks.cache_interruptions --json

The fault comes at evenly spaced operations of the verb's disk. A full disk must be one message and
exit code 2 or 3; after either, the same command must give the very bytes of one that nothing
disturbed, with nothing in `tmp/`, and the source must be untouched.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks import needs
from benchmarks.cache_trial import asking, publish
from stillroom.cache_schemas import layout
from tests import verb_trials as trials
from tests.cache_trials import contents, small_plan
from tests.synthetic_records import write_cache


def tried(
    folder: Path, verb: trials.Verb, trial: Callable[[list[str], int], bool], count: int
) -> dict:
    """One kind of fault at `count` operations of one verb."""
    whole = folder / "whole"
    whole.mkdir()
    total = trials.operations(verb(whole))
    expected, hit = contents(whole / "new"), 0
    for number in range(count):
        place = folder / str(number)
        place.mkdir()
        hit += trial(verb(place), number * total // count)
        trials.ended_well(verb(place), place, expected)
        shutil.rmtree(place)
    return {"trials": count, "interrupted": hit, "disk_operations": total}


def repairs(folder: Path, cache: Path, trial: Callable[[list[str], int], bool], count: int) -> dict:
    """One kind of fault at `count` operations of repairing a cache whose metadata is damaged."""
    spoilt = [layout.PLAN, layout.CODEC, layout.index(0)]

    def damaged(place: Path) -> Path:
        copy = Path(shutil.copytree(cache, place / "new"))
        for name in spoilt:
            (copy / name).write_bytes(b"damaged")
        return copy

    total = trials.operations(["cache", "repair", str(damaged(folder / "whole"))])
    expected, hit = contents(folder / "whole" / "new"), 0
    for number in range(count):
        place = folder / f"repair{number}"
        command = ["cache", "repair", str(damaged(place))]
        hit += trial(command, number * total // count)
        trials.ended_well(command, place, expected)
        shutil.rmtree(place)
    return {"trials": count, "interrupted": hit, "disk_operations": total}


def main() -> None:
    """Measure and print."""
    parser = asking(__doc__)
    parser.add_argument("--disks", type=int, default=10, help="Full disks per verb.")
    parser.add_argument("--kills", type=int, default=20, help="Kills per verb.")
    options = parser.parse_args()
    result = {}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        cache = Path(write_cache(folder / "cache", small_plan()))
        before = contents(cache)
        verbs = trials.verbs(cache, [cache, cache]) | {"repair": None}
        for kind, trial, count in (
            ("full_disks", trials.filled, options.disks),
            ("kills", trials.killed, options.kills),
        ):
            result[kind] = {}
            for verb, made in verbs.items():
                place = folder / f"{kind}-{verb}"
                place.mkdir()
                result[kind][verb] = (
                    tried(place, made, trial, count)
                    if made
                    else repairs(place, cache, trial, count)
                )
        assert contents(cache) == before
    publish("cache_interruptions", result, options.json)


if __name__ == "__main__":
    needs.run(main)
