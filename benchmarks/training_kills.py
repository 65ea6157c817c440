"""kill -9 in training from a cache, at random moments of its wall-clock time.

    python -m benchmarks.training_kills --json

Each is followed by the same command until it ends, which must give the losses of a training that
nothing disturbed, step by step. The command runs in forked children, so that a trial costs no
start of Python.
"""

import json
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import stillroom.pipeline.training.trainer  # noqa: F401  (loaded once, before the forks)
from benchmarks import needs
from benchmarks.cache_trial import asking, publish
from stillroom.stages.__main__ import run
from tests import memory_cache, run_texts, tiny_models
from tests.faulty_disk import in_child

STEPS = 12


def _prepared(folder: Path) -> None:
    teacher = tiny_models.save_llama(folder / "teacher")
    memory_cache.captured(teacher, memory_cache.examples(8)).write(folder / "cache")
    os._exit(0)


def _trained(folder: Path, place: Path, seconds: float | None) -> bool:
    """Whether training was still at work after so many seconds; None lets it end."""
    file = place / "run.toml"
    names = {"directory": place / "run", "teacher": folder / "teacher", "cache": folder / "cache"}
    more = "checkpoint_every = 3"
    file.write_text(run_texts.TRAIN.format(**names, steps=STEPS, more=more))
    child = os.fork()
    if child == 0:
        try:
            os._exit(run(["train", str(file)]))
        finally:
            os._exit(9)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL


def _losses(place: Path) -> dict[int, float]:
    lines = (place / "run" / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines)}


def kills(folder: Path, count: int, seed: int) -> dict:
    """Kills at random moments, each then ended in peace."""
    assert in_child(lambda: _prepared(folder)) == 0
    (folder / "whole").mkdir()
    began = time.perf_counter()
    _trained(folder, folder / "whole", None)
    longest, expected = time.perf_counter() - began, _losses(folder / "whole")
    assert len(expected) == STEPS
    choice, killed = random.Random(seed), 0
    for number in range(count):
        place = folder / str(number)
        place.mkdir()
        killed += _trained(folder, place, choice.random() * longest)
        _trained(folder, place, None)
        assert _losses(place) == expected, number
        shutil.rmtree(place)
    return {"trials": count, "killed": killed, "seconds_of_a_run": round(longest, 2)}


def main() -> None:
    """Measure and print."""
    parser = asking(__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        result = kills(Path(name), options.kills, options.seed)
    publish("training_kills", result, options.json)


if __name__ == "__main__":
    needs.run(main)
