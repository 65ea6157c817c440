"""A process that ends when the one that started it is gone, `kill -9` too.

One idea: the starter alone holds the writing end of a pipe, and a pipe without a writer reads as
ended; so there is nothing to poll, no process id that may be given out again, and no moment at
which the death is missed. It ends at once and by SIGKILL, as its starter did: what a stage has
finished is kept whatever kills it. Of processes that others start (Ray's, vLLM's workers) nothing
is known here: those watch their own starter in the same way.
"""

import multiprocessing
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PIPE = "STILLROOM_PARENT_PIPE"
"""Environment of a process that is to watch: the number of the pipe's reading end."""


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen]:
    """Within it a command runs that calls `end_with_parent`; it is not left behind."""
    reading, writing = os.pipe()  # neither is inherited by what else is started meanwhile
    try:
        surroundings = os.environ | {PIPE: str(reading)}
        process = subprocess.Popen(command, env=surroundings, pass_fds=[reading])
    except BaseException:
        os.close(writing)
        raise
    finally:
        os.close(reading)
    try:
        yield process
    finally:
        os.close(writing)
        process.wait()


def end_with_parent() -> None:
    """End this process as soon as the one that `started` it is gone; nothing without one."""
    number = os.environ.pop(PIPE, "")  # a command that this process starts has another parent
    if number:
        os.set_inheritable(int(number), False)
        _when(lambda: _until_closed(int(number)))


def end_with_pool() -> None:
    """The same for a process of `multiprocessing`, which has such a pipe by itself."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        _when(parent.join)


def _until_closed(reading: int) -> None:
    while os.read(reading, 1):
        pass


def _when(gone: Callable[[], None]) -> None:
    """SIGKILL this process when `gone` returns."""

    def watch() -> None:
        gone()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent", daemon=True).start()
