"""A stage as a process of its own, so that one's engine is gone before the next one's model comes.

One idea: what is run is the command that a person would type, and it is shown; a stage that fails
has said why, and its exit code is passed on. It is told to stop when we are, and has the time that
it needs for a checkpoint; when we are killed it ends too. Which stages there are is not known here.
"""

import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from stillroom.cache_schemas.errors import EXIT_INCOMPLETE, StillroomError
from stillroom.pipeline.parent_process import started
from stillroom.stages.console import say


class StageFailed(StillroomError):
    """A stage that ended early; it has already said why."""

    def __init__(self, stage: str, code: int):
        super().__init__(f"the {stage} stage ended with exit code {code}; its message is above")
        self.exit_code = code if code > 0 else EXIT_INCOMPLETE


def perform(command: list[str]) -> None:
    """Run one command of `stillroom`.

    Raises:
        StageFailed: it did not end with 0.
        KeyboardInterrupt: this process was told to stop, and the stage has.
    """
    say(f"$ stillroom {shlex.join(command)}")
    line = [sys.executable, "-m", "stillroom.stages", *command]
    with started(line) as stage, passed_on(stage) as told:
        code = stage.wait()
    if told:
        raise KeyboardInterrupt
    if code:
        raise StageFailed(command[0], code)


@contextmanager
def passed_on(stage: subprocess.Popen) -> Iterator[list[int]]:
    """Within it what tells us to stop tells a stage; the signals so far, of which none raises.

    A terminal sends its Ctrl-C to both, so the first SIGINT needs no passing on: a second one would
    tell the stage not even to write a checkpoint.
    """
    told: list[int] = []

    def tell(number: int, _frame) -> None:
        if told or number == signal.SIGTERM:
            stage.terminate()
        told.append(number)

    before = {number: signal.signal(number, tell) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
