"""A sweep whose arms several ranks train together: one of them speaks, measures and writes."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from stillroom.cache_schemas.errors import ConfigError
from stillroom.pipeline.training import arms
from tests.integration.test_parallel_training import THREADS, meeting_place
from tests.integration.test_sweep import BAD, SWEEP, cache, files

__all__ = ["cache", "files"]


def torchrun(sweep, ranks=2) -> list[subprocess.CompletedProcess]:
    """`train --sweep` in processes as torchrun would start them, a microbatch to each."""
    base = sweep.with_name("base.toml")
    base.write_text(base.read_text() + f"accumulate = {ranks}\n")
    line = [sys.executable, "-m", "stillroom.stages", "train", "--sweep", str(sweep)]
    with meeting_place() as place, ThreadPoolExecutor(ranks) as pool:

        def start(rank: int) -> subprocess.CompletedProcess:
            names = {"WORLD_SIZE": ranks, "RANK": rank, "LOCAL_RANK": rank}
            told = {name: str(value) for name, value in names.items()} | place | THREADS
            surroundings = os.environ | told
            return subprocess.run(
                line, env=surroundings, capture_output=True, text=True, timeout=300
            )

        return list(pool.map(start, range(ranks)))


def test_only_the_main_rank_of_several_speaks_measures_and_writes(files, tmp_path):
    main, other = torchrun(files())
    assert (main.returncode, other.returncode) == (0, 0), main.stderr + other.stderr
    assert "reverse" in main.stdout
    assert other.stdout == ""
    assert "sweep" not in other.stderr
    results = json.loads((tmp_path / "run" / "sweep.json").read_text())
    assert [one["steps"] for one in results.values()] == [2, 2]
    assert (tmp_path / "run" / "sweep.png").exists()


@pytest.mark.slow
def test_a_failed_arm_of_several_ranks_leaves_the_others(files, tmp_path):
    main, other = torchrun(files(text=BAD))
    assert (main.returncode, other.returncode) == (3, 0), main.stderr + other.stderr
    assert "1 of 4 arms failed" in main.stderr
    assert "failed" not in other.stderr
    results = json.loads((tmp_path / "run" / "sweep.json").read_text())
    assert results["last"]["steps"] == 2


def test_arms_that_all_ranks_refuse_are_told_once(files, tmp_path):
    refused = SWEEP.replace("learning_rate = 1e-4", "accumulate = 3")
    main, other = torchrun(
        files(text=refused.replace('"as-it-is"', '"as-it-is"\ntrain = {{ accumulate = 1 }}'))
    )
    assert (main.returncode, other.returncode) == (3, 0), main.stderr + other.stderr
    assert "2 of 2 arms failed" in main.stderr
    assert "failed" not in other.stderr


def test_arms_side_by_side_are_refused_under_torchrun(files, tmp_path, monkeypatch):
    sweep = files(side_by_side=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"side_by_side = 2 in 2 processes.*Set side_by_side = 1"):
        arms.run_sweep(sweep)
    assert not (tmp_path / "run").exists()


def test_what_breaks_in_one_of_several_ranks_ends_the_sweep(monkeypatch):
    """Another arm begun by this rank alone would wait for the others, who wait for it."""

    def broken():
        raise MemoryError("too much")

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MemoryError):
        arms.attempt(broken)
