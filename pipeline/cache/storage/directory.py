"""Where a cache lies: a few operations on named bytes, for a directory or for a bucket.

One idea: a file is written whole, made durable, and appears under its name at once and only if
nothing has that name, or it does not appear. Everything above relies on this and on nothing else:
no locks, no appends, no renames over finished files. `DirectoryStorage` is here, buckets are in
`bucket.py`.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, Protocol

from stillroom.cache_schemas import layout
from stillroom.cache_schemas.errors import CacheError, ShardCorrupt

NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
PATHS_CHECKED = 1 << 16
"""How many names are known not to be reached through a link."""


class Storage(Protocol):
    """Named bytes under one root. Names are relative and come from `cache_schemas.layout`."""

    location: str
    """The root, for messages; never holds credentials."""

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """A file, or exactly `length` bytes of it from `start`.

        Raises:
            FileNotFoundError: no such file.
            ShardCorrupt: the file ends too early.
        """
        ...

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        ...

    def list(self, folder: str) -> dict[str, int]:
        """Names (with the folder) and sizes of the files directly in a folder."""
        ...

    def create(self, name: str, source: bytes | Path) -> bool:
        """Write a file durably unless the name is taken; False if it is."""
        ...

    def replace(self, name: str, data: bytes) -> None:
        """Write a small file durably, over an older one if there is one."""
        ...

    def delete(self, name: str) -> None:
        """Remove a file; nothing happens where there is none."""
        ...

    def staging(self) -> contextlib.AbstractContextManager[Path]:
        """An empty local directory to build files in, removed afterwards."""
        ...

    def sweep(self) -> None:
        """Remove what writers that were killed left in their staging directories."""
        ...

    def claim(self, name: str) -> "Claim | None":
        """Hold a name until it is released or this process ends; None if another process does.

        Where the storage cannot tell the living from the dead, everyone gets a claim: it saves
        double work and guards nothing.
        """
        ...


class Claim:
    """A name that is held; see `Storage.claim`."""

    def __init__(self, path: Path | None = None, file: IO | None = None):
        self._path, self._file = path, file

    def release(self) -> None:
        """Give it up."""
        if self._path is not None and self._file is not None:
            self._path.unlink(missing_ok=True)
            self._file.close()


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


class DirectoryStorage:
    """A directory on a local or shared file system."""

    def __init__(self, root: str | Path, disk: Disk | None = None):
        self.root = Path(root)
        self.location = str(self.root)
        self.disk = disk or Disk()
        self.path = lru_cache(PATHS_CHECKED)(self._confined)

    def _confined(self, name: str) -> Path:
        """The file of a name.

        Raises:
            CacheError: a link leads out of the cache.
        """
        path = self.root / name
        if os.path.realpath(path) != os.path.join(os.path.realpath(self.root), name):
            raise CacheError(
                "is reached through a symbolic link",
                where=str(path),
                remedy="Put the file itself there.",
            )
        return path

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        with open(self.path(name), "rb") as file:
            size = os.fstat(file.fileno()).st_size - start
            wanted = size if length is None else length
            if wanted > size:
                cut_short(f"{self.location}/{name}", size, wanted)
            return os.pread(file.fileno(), wanted, start)

    def size(self, name: str) -> int | None:
        try:
            return self.path(name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def list(self, folder: str) -> dict[str, int]:
        try:
            entries = list(os.scandir(self.path(folder) if folder else self.root))
        except FileNotFoundError:
            return {}
        prefix = f"{folder}/" if folder else ""
        files = [entry for entry in entries if entry.is_file(follow_symlinks=False)]
        return {prefix + entry.name: entry.stat().st_size for entry in files}

    def create(self, name: str, source: bytes | Path) -> bool:
        target = self.path(name)
        self._make_folder(target.parent)
        with self._temporary(source) as temporary:
            if not self._appear(temporary, target):
                return False
        self.disk.sync(target.parent)
        return True

    def replace(self, name: str, data: bytes) -> None:
        target = self.path(name)
        self._make_folder(target.parent)
        with self._temporary(data) as temporary:
            self.disk.rename(temporary, target)
        self.disk.sync(target.parent)

    def delete(self, name: str) -> None:
        self.path(name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        made, lock = self._new_staging()
        try:
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)
            os.close(lock)
            with contextlib.suppress(OSError):
                made.parent.rmdir()

    def sweep(self) -> None:
        parent = self.root / layout.STAGING
        for left in list(parent.iterdir()) if parent.is_dir() else []:
            # What belongs to a living writer cannot be locked, and stays.
            with contextlib.suppress(OSError), _locked(left):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        with contextlib.suppress(OSError):
            parent.rmdir()

    def claim(self, name: str) -> Claim | None:
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = open(path, "a")  # noqa: SIM115
        except FileNotFoundError:
            return Claim()
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError:
            return Claim(path, file)
        return Claim(path, file)

    def _new_staging(self) -> tuple[Path, int]:
        """A directory and the lock that tells others that its owner is alive.

        Others take away the folder above when they leave it empty, and what nobody holds yet: then
        it is made again.
        """
        while True:
            made = self.root / layout.STAGING / secrets.token_hex(8)
            try:
                made.mkdir(parents=True)
                lock = os.open(made, os.O_RDONLY)
            except FileNotFoundError:
                continue
            except (FileExistsError, NotADirectoryError):
                remedy = "Choose another place for the cache."
                raise CacheError("is not a directory", where=self.location, remedy=remedy) from None
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if made.is_dir():
                return made, lock
            os.close(lock)

    @contextlib.contextmanager
    def _temporary(self, source: bytes | Path) -> Iterator[Path]:
        """A synced file on this file system with the content of `source`."""
        if isinstance(source, Path):
            self.disk.sync(source)
            yield source
            return
        with self.staging() as folder:
            self.disk.write(folder / "file", source)
            yield folder / "file"

    def _appear(self, temporary: Path, target: Path) -> bool:
        """Link a finished file to its name. A network file system may report a failure of a call
        that was carried out, so what counts is whether both names are one file."""
        try:
            self.disk.link(temporary, target)
            return True
        except OSError as error:
            if target.exists():
                return os.path.samefile(temporary, target)  # our own link counts as made
            if error.errno not in NO_HARD_LINKS:
                raise
        self.disk.rename(temporary, target)
        return True

    def _make_folder(self, folder: Path) -> None:
        if folder.is_dir():
            return
        self._make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        self.disk.sync(folder.parent)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds what lies in staging; OSError if its owner lives, or where there are no such locks."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)


def cut_short(where: str, found: int, expected: int) -> None:
    """Refuse a file that ends too early."""
    raise ShardCorrupt(
        f"has {max(found, 0)} bytes left",
        expected=f"{expected}",
        where=where,
        remedy="Get it again.",
    )
