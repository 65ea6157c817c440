"""A directory beside the place where its content will go, whole or not at all.

One idea: whoever works in such a directory holds a lock in it, so the next one may remove those
that a killed process left. What is made there is not known here.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = "lock"


@contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """An empty directory beside a place, gone afterwards; abandoned ones of that place go first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}-"
    for left in target.parent.glob(f"{prefix}*"):
        _remove_abandoned(left)
    with (
        tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix) as directory,
        Path(directory, LOCK).open("w") as lock,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Path(directory)


def replace_directory(made: Path, target: Path) -> None:
    """Put a finished directory in a place that may hold an older one."""
    old = target.with_name(f"{target.name}.old-{os.getpid()}")
    if target.exists():
        os.rename(target, old)
    os.rename(made, target)
    for left in target.parent.glob(f"{target.name}.old-*"):
        shutil.rmtree(left, ignore_errors=True)


def _remove_abandoned(directory: Path) -> None:
    try:
        with (directory / LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
    except OSError:  # somebody works in it, or it is none of ours
        return
