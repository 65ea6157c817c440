"""Stages as processes that a test may kill: the real command line, without its start-up each time.

One idea: a fork server imports what is heavy once; every stage is a fresh fork of it, killed with
SIGKILL when the test says so.
"""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

PRELOADED = [
    "stillroom.stages.__main__",
    "stillroom.pipeline.capture.job",
    "stillroom.pipeline.training.trainer",
    "stillroom.pipeline.evaluation.held_out",
    "stillroom.pipeline.corpus.preparing",
    "stillroom.pipeline.teacher.reference.engine",
    "stillroom.pipeline.training.curves",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto",
]
POLL_SECONDS = 0.01
MOST_SECONDS = 240.0

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(PRELOADED)


def start(*arguments: str | Path, log: Path) -> BaseProcess:
    """Start `stillroom ARGUMENTS...`; what it writes is appended to `log`."""
    process = _forks.Process(target=_stage, args=([str(a) for a in arguments], str(log)))
    process.start()
    return process


def finish(process: BaseProcess) -> int | None:
    """Exit code of a process that is let run to its end."""
    process.join(MOST_SECONDS)
    return process.exitcode


def kill_when(process: BaseProcess, due: Callable[[], bool], patience: float = 0.0) -> int | None:
    """SIGKILL a process `patience` seconds after `due()` first holds; its exit code.

    A process that ends before that is left alone.
    """
    for _ in range(int(MOST_SECONDS / POLL_SECONDS)):
        if due() or not process.is_alive():
            break
        process.join(POLL_SECONDS)
    process.join(patience)
    process.kill()
    process.join()
    return process.exitcode


def _stage(arguments: list[str], log: str) -> None:
    written = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(written, 1)
    os.dup2(written, 2)
    from stillroom.stages import __main__ as shell

    os._exit(shell.run(arguments))
