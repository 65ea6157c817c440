"""Disks that fail: at the n-th operation, by killing the process, or by losing power.

One idea: the writer reaches the disk through `Disk`, so counting its calls reaches every moment at
which a machine can stop, and a recorded run can be cut off anywhere.
"""

import errno
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from stillroom.pipeline.cache.storage.disk import Disk


class CountingDisk(Disk):
    """Calls `before(operation number)` ahead of every operation."""

    def __init__(self, before: Callable[[int], None]):
        self.before, self.count = before, 0

    def _step(self) -> None:
        self.before(self.count)
        self.count += 1

    def write(self, path: Path, data: bytes) -> None:
        self._step()
        half = path.with_name(path.name + ".half")
        half.write_bytes(data[: len(data) // 2])
        self._step()
        half.unlink()
        super().write(path, data)

    def sync(self, path: Path) -> None:
        self._step()
        super().sync(path)

    def link(self, source: Path, target: Path) -> None:
        self._step()
        super().link(source, target)

    def rename(self, source: Path, target: Path) -> None:
        self._step()
        super().rename(source, target)


def killing(at: int) -> CountingDisk:
    """Kills its own process, as `kill -9` does, before operation `at`."""
    return CountingDisk(lambda count: os.kill(os.getpid(), signal.SIGKILL) if count == at else None)


def full(at: int) -> CountingDisk:
    """Has no space from operation `at` on."""

    def check(count: int) -> None:
        if count >= at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "disk")

    return CountingDisk(check)


class PowerLoss(Exception):
    """The machine stopped."""


class VolatileDisk(Disk):
    """Remembers what would survive a power loss before operation `at`.

    A file survives whole only if it was synced; a name survives for certain only if its directory
    was synced after it was given.
    """

    def __init__(self, at: int):
        self.at, self.count = at, 0
        self.synced: set[int] = set()
        self.uncertain: list[Path] = []

    def _step(self) -> None:
        if self.count == self.at:
            raise PowerLoss
        self.count += 1

    def write(self, path: Path, data: bytes) -> None:
        self._step()
        path.write_bytes(data)
        self._step()
        self.synced.add(path.stat().st_ino)

    def sync(self, path: Path) -> None:
        self._step()
        if path.is_dir():
            self.uncertain = [name for name in self.uncertain if name.parent != path]
        else:
            self.synced.add(path.stat().st_ino)

    def link(self, source: Path, target: Path) -> None:
        self._step()
        os.link(source, target)
        self.uncertain.append(target)

    def rename(self, source: Path, target: Path) -> None:
        self._step()
        before = target.read_bytes() if target.exists() else None
        os.replace(source, target)
        self.uncertain.append(target)
        self.before = before

    def lose_power(self, root: Path, choice: random.Random) -> None:
        """Leave in `root` what a disk may hold after the power came back."""
        for path in self.uncertain:
            if choice.random() < 0.5 and path.exists():
                path.unlink()
        for path in [p for p in root.rglob("*") if p.is_file()]:
            if path.stat().st_ino not in self.synced:
                kept = choice.randrange(path.stat().st_size + 1)
                data = path.read_bytes()
                path.unlink()
                path.write_bytes(data[:kept] + bytes(len(data) - kept))


def in_child(work: Callable[[], None]) -> int:
    """Run something in a forked process; its exit status as `os.waitpid` gives it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def copy_tree(source: Path, target: Path) -> Path:
    """A fresh copy of a directory."""
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))
