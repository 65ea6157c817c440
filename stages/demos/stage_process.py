"""A stage of a demo as a process of its own, so that vLLM is gone before students are there."""

import subprocess
import sys
from pathlib import Path

from stillroom.cache_schemas.errors import StillroomError


def perform(stage: str, run_file: Path, engine: str, *more: str) -> None:
    """Run one stage of a run file.

    Raises:
        StillroomError: it failed; it has already said why.
    """
    command = [sys.executable, "-m", "stillroom.stages", stage, str(run_file), *more]
    command += ["--engine", engine] if stage == "capture" else []
    code = subprocess.run(command, check=False).returncode
    if code:
        raise StillroomError(f"the {stage} stage ended with exit code {code}")
