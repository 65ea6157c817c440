"""A cache in a directory on a local or shared file system.

One idea: a file is built in staging, made durable, and linked to its name; no link below the root
is ever followed, so nothing outside is read or emptied. What of it may fail is in `Disk`.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from stillroom.cache_schemas import layout
from stillroom.cache_schemas.errors import CacheError, ShardCorrupt
from stillroom.pipeline.cache.storage.disk import Disk
from stillroom.pipeline.cache.storage.protocol import Claim, check_whole, cut_short, most_bytes

NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
BROKEN = {errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.ENXIO, errno.EREMOTEIO, errno.ESTALE}
"""What a failing disk answers, or a file server that has lost the file."""
PATHS_CHECKED = 1 << 16
"""How many names are known not to be reached through a link."""


class DirectoryStorage:
    """A directory on a local or shared file system."""

    def __init__(self, root: str | Path, disk: Disk | None = None):
        self.root = Path(root)
        self.location = str(self.root)
        self.disk = disk or Disk()
        self.path = lru_cache(PATHS_CHECKED)(self._confined)

    def __reduce__(self) -> tuple:
        return type(self), (self.root, self.disk)

    def _confined(self, name: str) -> Path:
        """The file of a name.

        Raises:
            CacheError: the name, or a link on its way, leads out of the cache.
        """
        path = self.root / name
        if layout.leads_out(name):
            raise CacheError("is no name of a cache's file", where=f"{self.location}: {name!r}")
        found = os.path.realpath(path)
        if found != os.path.join(os.path.realpath(self.root), name) and not self._is_blob(found):
            raise CacheError(
                "is reached through a symbolic link",
                where=str(path),
                remedy="Put the file itself there.",
            )
        return path

    def _is_blob(self, found: str) -> bool:
        """Whether a link leads to where the hub's own cache keeps the files of this very snapshot:
        `snapshots/COMMIT/NAME -> blobs/HASH` of one repository."""
        above = Path(os.path.realpath(self.root)).parents
        homes = [place.parent / "blobs" for place in above if place.name == "snapshots"]
        return Path(found).parent in homes

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        where = f"{self.location}/{name}"
        try:
            with open(self.path(name), "rb", opener=_without_waiting) as file:
                wanted = _wanted(os.fstat(file.fileno()), name, start, length, where)
                return _read_fully(file.fileno(), wanted, start, where)
        except OSError as error:
            raise _unreadable(error, where) from None

    def forget(self, name: str, start: int = 0, length: int | None = None) -> None:
        """Nothing of a file is kept."""

    def size(self, name: str) -> int | None:
        # Most names that are asked for are not there, and links cost many calls to look for.
        if not layout.leads_out(name) and not os.path.lexists(f"{self.location}/{name}"):
            return None
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
        parent = self._staging_root()
        for left in list(parent.iterdir()) if parent.is_dir() else []:
            if not layout.is_staged(left.name) or left.is_symlink():
                continue
            with contextlib.suppress(OSError), locked(left):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        with contextlib.suppress(OSError):
            parent.rmdir()

    def strangers(self) -> tuple[str, ...]:
        names = sorted(entry.name for entry in os.scandir(self.root)) if self.root.is_dir() else []
        staging = self._staging_root()
        if layout.STAGING in names and staging.is_dir():
            left = sorted(entry.name for entry in os.scandir(staging))
            names += [f"{layout.STAGING}/{name}" for name in left if not layout.is_staged(name)]
            names.remove(layout.STAGING)
        return tuple(names)

    def _staging_root(self) -> Path:
        """Raises:
        CacheError: it is a link, and what it leads to is not ours to empty.
        """
        parent = self.root / layout.STAGING
        if parent.is_symlink():
            raise CacheError(
                "is a symbolic link",
                where=str(parent),
                remedy="Remove the link; it is only staging.",
            )
        return parent

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

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        self._make_folder(self.root)
        lock = os.open(self.root, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some network file systems lock no directories
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _new_staging(self) -> tuple[Path, int]:
        """A directory and the lock that tells others that its owner is alive.

        Others take away the folder above when they leave it empty, and what nobody holds yet: then
        it is made again.
        """
        parent = self._staging_root()
        while True:
            made = parent / secrets.token_hex(layout.STAGED_BYTES)
            try:
                made.mkdir(parents=True)
                lock = os.open(made, os.O_RDONLY)
            except FileNotFoundError:
                continue
            except (FileExistsError, NotADirectoryError) as error:
                gone = isinstance(error, FileExistsError) and not os.path.lexists(parent)
                if gone or parent.is_dir():
                    continue  # taken away between being found there and looked at
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


def _without_waiting(path: str, flags: int) -> int:
    """A named pipe opens at once, and is seen to be none of our files."""
    return os.open(path, flags | os.O_NONBLOCK)


def _wanted(found: os.stat_result, name: str, start: int, length: int | None, where: str) -> int:
    """How many bytes to read of what was opened."""
    if not stat.S_ISREG(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "no regular file", where)
    size = found.st_size - start
    if length is None:
        check_whole(where, size, most_bytes(name))
    elif length > size:
        cut_short(where, size, length)
    return size if length is None else length


def _read_fully(descriptor: int, length: int, start: int, where: str) -> bytes:
    """Exactly these bytes; one call gives at most 2 GiB."""
    parts, left = [], length
    while left and (part := os.pread(descriptor, left, start + length - left)):
        parts.append(part)
        left -= len(part)
    if left:
        cut_short(where, length - left, length)
    return b"".join(parts)


def _unreadable(error: OSError, where: str) -> Exception:
    """The error that a failed reading deserves."""
    if error.errno == errno.EISDIR:
        return ShardCorrupt("is no file", where=where, remedy="Put the file itself there.")
    if error.errno in BROKEN:
        remedy = "Look at the disk; then pull it again, or repair the cache and capture again."
        return ShardCorrupt(f"cannot be read: {error.strerror}", where=where, remedy=remedy)
    error.filename = error.filename or where
    return error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds what lies in staging; OSError if its owner lives, or where there are no such locks."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)
