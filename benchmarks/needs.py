"""What a benchmark needs and may not find: a model, and other people's packages.

One idea: what cannot be done without is one message that says what to run, and what can be done
without is left out by name. It fetches nothing and measures nothing.
"""

import sys
from collections.abc import Callable

from stillroom.cache_schemas.errors import StillroomError, TeacherError

MODEL = ".cache/models/SmolLM2-135M-Instruct"
FETCH = "stillroom teacher fetch smollm2"
PEERS = {"liger_kernel": "liger-kernel", "cut_cross_entropy": "cut-cross-entropy"}
"""Module -> distribution of the packages in the extra `peers`."""


def run(main: Callable[[], None]) -> None:
    """Run a benchmark; what a person can put right is one message on stderr and an exit code."""
    try:
        main()
    except StillroomError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def model(named: str) -> str:
    """The directory of a model named with `--model`.

    Raises:
        TeacherError: it is not there.
    """
    from stillroom.pipeline.config import Teacher
    from stillroom.pipeline.teacher.facts import model_directory

    try:
        return str(model_directory(Teacher(model=named)))
    except TeacherError as error:
        remedy = f"Run `{FETCH}`, which makes {MODEL}, or name an HF directory with --model."
        raise TeacherError(
            error.found, expected=error.expected, where=error.where, remedy=remedy
        ) from None


def why_not(error: Exception) -> str:
    """Why something could not be measured, in a line that a result may carry."""
    package = PEERS.get((getattr(error, "name", None) or "").split(".")[0])
    if package and isinstance(error, ModuleNotFoundError):
        return f"{package} is not installed; run `pip install 'stillroom[peers]'`"
    return f"{type(error).__name__}: {error}"[:300]
