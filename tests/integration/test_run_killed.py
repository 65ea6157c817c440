"""`stillroom run` that is killed or told to stop takes its stage with it; the next is let in."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stillroom.pipeline.training.lock import exclusive
from stillroom.pipeline.training.metrics import read_metrics
from stillroom.pipeline.training.parallel import ALONE
from tests import memory_cache, tiny_models
from tests.run_texts import TRAIN

PATIENCE = 200.0
"""Seconds until a test fails that waits for what does not come; nothing takes so long."""
STEPS = 1_000_000


def children(process: int) -> list[int]:
    """Processes that a process has started."""
    return [int(n) for n in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def ended(watched: int) -> bool:
    """Whether the process of a pidfd ends."""
    return bool(select.select([watched], [], [], PATIENCE)[0])


class Started:
    """`stillroom run` of a training that has no end, at work.

    Attributes:
        process: of the run.
        stage: pidfd of its stage.
    """

    def __init__(self, directory: Path, teacher: Path, cache: Path):
        self.directory, file = directory / "run", directory / "run.toml"
        where = {"directory": self.directory, "teacher": teacher, "cache": cache}
        file.write_text(TRAIN.format(**where, steps=STEPS, more="checkpoint_every = 1000000"))
        command = [sys.executable, "-m", "stillroom.stages", "run", str(file)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr
        self.said = self.process.stderr
        assert self.said.readline().startswith("$ stillroom train")
        while not self.steps():
            with pytest.raises(subprocess.TimeoutExpired):
                self.process.wait(0.05)
        (number,) = children(self.process.pid)
        self.stage = os.pidfd_open(number)

    def steps(self) -> int:
        return len(read_metrics(self.directory))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A teacher, and a cache of what it said."""
    root = tmp_path_factory.mktemp("models")
    teacher = tiny_models.save_llama(root / "teacher", num_layers=3)
    captured = memory_cache.captured(teacher, memory_cache.examples(12))
    return teacher, captured.write(root / "cache")


@pytest.fixture
def begun(models, tmp_path):
    run = Started(tmp_path, *models)
    yield run
    run.process.kill()
    run.process.wait()
    run.said.close()
    os.close(run.stage)


def test_a_run_that_is_killed_leaves_no_stage_at_work(begun):
    begun.process.kill()
    assert ended(begun.stage)
    with exclusive(begun.directory, ALONE):  # the next one is not refused
        pass


def test_a_run_that_is_told_to_stop_waits_for_the_checkpoint_of_its_stage(begun):
    begun.process.send_signal(signal.SIGTERM)
    assert begun.process.wait(PATIENCE) == 3
    assert ended(begun.stage)
    assert any((begun.directory / "checkpoints").iterdir())
    said = begun.said.read()
    assert "stopping after this step; a checkpoint is kept" in said
    assert said.splitlines()[-1].startswith("interrupted; finished work is kept")
    assert "stillroom run" in said.splitlines()[-1]


POOL = """
import multiprocessing, os
from concurrent.futures import ProcessPoolExecutor
from stillroom.pipeline.parent_process import end_with_pool
pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), end_with_pool)
print(pool.submit(os.getpid).result(), flush=True)
input()
"""


def test_a_process_of_a_pool_ends_with_whoever_began_the_pool():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", POOL], text=True, **pipes) as begun:
        assert begun.stdout
        worker = os.pidfd_open(int(begun.stdout.readline()))
        begun.kill()
        assert ended(worker)
    os.close(worker)


ENDING = """
import atexit, os, signal, sys
from stillroom.stages.__main__ import main
atexit.register(lambda: os.kill(os.getpid(), signal.{name}))
sys.argv = ["stillroom", "schema"]
main()
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 0), ("SIGINT", -signal.SIGINT)])
def test_a_signal_in_pythons_own_end_raises_no_traceback(name, code):
    """When all was said; a second Ctrl-C ends a shutdown that hangs."""
    ran = subprocess.run([sys.executable, "-c", ENDING.format(name=name)], capture_output=True)
    assert (ran.returncode, ran.stderr) == (code, b"")
    assert ran.stdout.startswith(b"{")
