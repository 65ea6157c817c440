"""A section in a process of its own: what became of it, however it ended.

One idea: the parent never touches the GPU; it starts a process group, waits so long, and turns
whatever comes (figures, a message, a signal, silence) into one outcome.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.on_a_gpu.scale import Scale
from benchmarks.on_a_gpu.sections import SKIPPED, UNFINISHED

NO_END = "no end after"
INTERPRETED = {"TRITON_INTERPRET": "1", "STILLROOM_SWEEP": "triton", "OMP_NUM_THREADS": "1"}


def outcome_of(name: str, scale: Scale) -> dict[str, Any]:
    """Run a section: `outcome` passed, wrong, skipped, failed or timed out, `seconds`, `why` where
    it is not passed, and the section's figures."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        figures, why = _run(name, scale, Path(directory))
    outcome = "passed"
    if why or UNFINISHED in figures:
        why = why or figures.pop(UNFINISHED)
        outcome = "timed out" if why.startswith(NO_END) else "failed"
    elif SKIPPED in figures:
        outcome, why = SKIPPED, figures.pop(SKIPPED)
    elif figures.get("wrong"):
        outcome, why = "wrong", "; ".join(figures["wrong"])
    told = {"outcome": outcome, "seconds": round(time.monotonic() - start, 1)}
    return told | ({"why": why} if why else {}) | figures


def _run(name: str, scale: Scale, directory: Path) -> tuple[dict[str, Any], str]:
    """(figures, why there are none)."""
    out, log = directory / "figures.json", directory / "log"
    command = [sys.executable, "-m", "benchmarks.on_a_gpu", "--section", name, "--out", str(out)]
    command += ["--limit", str(scale.limit), *(["--tiny"] if scale.tiny else [])]
    why = run_within(command, scale.limit, log, INTERPRETED if scale.tiny else {})
    if why:
        return {}, why
    return json.loads(out.read_text()), ""


def run_within(command: list[str], limit: float, log: Path, variables: dict[str, str]) -> str:
    """Run a command and all that it starts; why it did not end well, or nothing.

    Args:
        limit: seconds.
        log: file for what it prints.
    """
    with log.open("w") as lines:
        child = subprocess.Popen(
            command,
            env=os.environ | variables,
            stdout=lines,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            child.wait(limit)
        except subprocess.TimeoutExpired:
            return f"{NO_END} {limit:g} s; last lines: {_end_of(log)}"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        return f"ended by {name}; last lines: {_end_of(log)}"
    return "" if child.returncode == 0 else _end_of(log)


def _end_of(log: Path) -> str:
    """The last lines of a log, which end with the exception if there was one."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-4:])[-600:]
