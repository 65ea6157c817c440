"""Verbs that make caches from caches, interrupted: a disk that fills, and kill -9, anywhere.

One idea: both come at the n-th time that a verb touches the disk, so evenly spaced n reach every
part of it; afterwards the same command ends with the very bytes of one that was left in peace, and
nothing is left in `tmp/`. It judges; what a disk is and does is `faulty_disk`.
"""

import contextlib
import io
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from stillroom.cache_schemas import layout
from stillroom.pipeline.cache.storage import directory
from stillroom.stages.__main__ import run
from tests.cache_trials import contents
from tests.faulty_disk import CountingDisk, full, in_child, killing

Verb = Callable[[Path], list[str]]
"""From the place where results go to the command line."""


def verbs(cache: Path, parts: list[Path]) -> dict[str, Verb]:
    """Every verb that writes a cache, by its name."""
    source = str(cache)
    few, small = ("--examples", "5"), ("--examples-per-shard", "3")
    return {
        "push": lambda place: ["cache", "push", source, str(place / "new")],
        "pull": lambda place: ["cache", "pull", f"file://{source}", str(place / "new")],
        "merge": lambda place: ["cache", "merge", str(place / "new"), *map(str, parts)],
        "subset": lambda place: ["cache", "subset", source, str(place / "new"), *few],
        "reshard": lambda place: ["cache", "reshard", source, str(place / "new"), *small],
    }


@contextlib.contextmanager
def on(disk: CountingDisk) -> Iterator[None]:
    """Every directory storage that is opened meanwhile is on this disk."""
    opened = directory.DirectoryStorage.__init__

    def open_on_disk(self, root, given=None):
        opened(self, root, given or disk)

    directory.DirectoryStorage.__init__ = open_on_disk
    try:
        yield
    finally:
        directory.DirectoryStorage.__init__ = opened


def stillroom(command: list[str]) -> tuple[int | None, str]:
    """Exit code and stderr; None and the error where it would be a traceback."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        try:
            return run(command), told.getvalue()
        except Exception as error:
            return None, f"{type(error).__name__}: {error}"


def operations(command: list[str]) -> int:
    """How often a command touches the disk when nothing fails."""
    disk = full(1 << 40)
    with on(disk):
        code, told = stillroom(command)
    assert code == 0, told
    return disk.count


def filled(command: list[str], at: int) -> bool:
    """Run out of space at an operation: one message, no traceback. False where it ended before."""
    with on(full(at)):
        code, told = stillroom(command)
    assert code in (0, 2, 3), told
    assert "Traceback" not in told
    if code:
        assert told.count("error: ") == 1, told
        assert "No space left on device" in told, told
    return code != 0


def killed(command: list[str], at: int) -> bool:
    """Kill the command before an operation; False where it ended before."""

    def work() -> None:
        with on(killing(at)):
            code, _ = stillroom(command)
        os._exit(code or 0)

    return os.WTERMSIG(in_child(work)) == signal.SIGKILL


def ended_well(command: list[str], place: Path, expected: dict[str, bytes]) -> None:
    """The same command again gives what it gives in peace, and leaves nothing in staging."""
    code, told = stillroom(command)
    assert code == 0, told
    assert contents(place / "new") == expected
    assert not (place / "new" / layout.STAGING).exists()
    assert sorted(path.name for path in place.iterdir()) == ["new"]
