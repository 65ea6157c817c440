"""The operating system's calls that make bytes durable.

One idea: what a disk may refuse, or lose when the power fails, goes through one small class, so
that tests put their faults there. It knows no cache.
"""

import os
from pathlib import Path


class Disk:
    """The operating system's calls that make bytes durable. Tests put faults here."""

    def write(self, path: Path, data: bytes) -> None:
        """Write a new file and sync it."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def sync(self, path: Path) -> None:
        """Sync a file or a directory's entries."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name; FileExistsError if that name is taken."""
        os.link(source, target)

    def rename(self, source: Path, target: Path) -> None:
        """Rename over whatever has the name."""
        os.replace(source, target)
