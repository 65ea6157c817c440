"""A stage as a process of its own, so that one's engine is gone before the next one's model comes.

One idea: what is run is the command that a person would type, and it is shown; a stage that fails
has said why, and its exit code is passed on. Which stages there are is not known here.
"""

import shlex
import subprocess
import sys

from stillroom.cache_schemas.errors import EXIT_INCOMPLETE, StillroomError
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
    """
    say(f"$ stillroom {shlex.join(command)}")
    code = subprocess.run([sys.executable, "-m", "stillroom.stages", *command]).returncode
    if code:
        raise StageFailed(command[0], code)
