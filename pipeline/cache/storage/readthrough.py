"""A local copy of what was read from far away, of bounded size.

One idea: a range that was read is a file named by the hash of cache and range; the oldest go when
the folder grows too large. What a file holds is checked when it is used again, and a bad one is
fetched anew. Whose bytes they are is in the name, so one folder may serve many caches, and a cache
that was published anew finds nothing of the old one. Writing is refused: it belongs to the storage
behind.
"""

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import xxhash

from stillroom.cache_schemas.errors import CacheError
from stillroom.pipeline.cache.storage.disk import Disk
from stillroom.pipeline.cache.storage.protocol import Claim, Storage

CHECKSUM_BYTES = 8
LOOKS = 16
"""The folder is measured again after every such part of its limit that was written: other readers
write to it too."""


class ReadThrough:
    """A storage whose reads are kept in a directory.

    Args:
        behind: where a miss is read from.
        directory: where ranges are kept; several processes may share it.
        limit_bytes: what the directory may hold; it may pass it by a sixteenth per reader.
        identity: of what lies behind, such as its manifest's hash; only reads of the same identity
            are shared.

    Raises:
        CacheError: the directory cannot be made.
    """

    def __init__(
        self, behind: Storage, directory: str | Path, limit_bytes: int, identity: str = ""
    ):
        self.behind, self.location = behind, behind.location
        self.directory, self.limit_bytes = Path(directory), limit_bytes
        self.identity = identity or self.location
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            where = str(directory)
            raise CacheError(f"is no place for a local copy ({error})", where=where) from None
        self._written = 0
        self._lock = threading.Lock()
        self._make_room(0)

    def __reduce__(self) -> tuple:
        return type(self), (self.behind, self.directory, self.limit_bytes, self.identity)

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        path = self._path(name, start, length)
        data = _kept(path)
        if data is None:
            data = self.behind.read(name, start, length)
            self._keep(path, data)
        return data

    def forget(self, name: str, start: int = 0, length: int | None = None) -> None:
        self._path(name, start, length).unlink(missing_ok=True)
        self.behind.forget(name, start, length)

    def _path(self, name: str, start: int, length: int | None) -> Path:
        asked = f"{self.identity}\n{name}\n{start}\n{length}".encode()
        return self.directory / hashlib.sha256(asked).hexdigest()

    def size(self, name: str) -> int | None:
        return self.behind.size(name)

    def list(self, folder: str) -> dict[str, int]:
        return self.behind.list(folder)

    def create(self, name: str, source: bytes | Path) -> bool:
        raise CacheError("a read-through copy is not written", where=self.location)

    def replace(self, name: str, data: bytes) -> None:
        raise CacheError("a read-through copy is not written", where=self.location)

    def delete(self, name: str) -> None:
        raise CacheError("a read-through copy is not written", where=self.location)

    def staging(self) -> contextlib.AbstractContextManager[Path]:
        return self.behind.staging()

    def sweep(self) -> None:
        self.behind.sweep()

    def strangers(self) -> tuple[str, ...]:
        return self.behind.strangers()

    def claim(self, name: str) -> Claim | None:
        return self.behind.claim(name)

    def alone(self) -> contextlib.AbstractContextManager[None]:
        return self.behind.alone()

    def _keep(self, path: Path, data: bytes) -> None:
        """Store a range; a full disk only means that it is not kept."""
        size = len(data) + CHECKSUM_BYTES
        if size > self.limit_bytes:
            return
        with self._lock:
            self._written += size
            if self._written > self.limit_bytes // LOOKS:
                self._make_room(size)
        # Others may be fetching the same.
        temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
        with contextlib.suppress(OSError):
            temporary.write_bytes(data + xxhash.xxh3_64_digest(data))
            Disk().rename(temporary, path)

    def _make_room(self, wanted: int) -> None:
        """If `wanted` bytes more would nearly fill the folder, remove what was used longest ago
        until a tenth of the room is left."""
        self._written = wanted
        entries = sorted(_entries(self.directory))
        used = wanted + sum(size for _, _, size in entries)
        if used <= self.limit_bytes * (LOOKS - 1) // LOOKS:
            return
        for _, path, size in entries:
            if used <= self.limit_bytes * 9 // 10:
                return
            path.unlink(missing_ok=True)
            used -= size


def _entries(directory: Path) -> Iterator[tuple[int, Path, int]]:
    """(when it was used, path, bytes) of every file; other readers may remove some meanwhile."""
    for entry in os.scandir(directory):
        with contextlib.suppress(FileNotFoundError):
            found = entry.stat()
            yield found.st_mtime_ns, Path(entry.path), found.st_size


def _kept(path: Path) -> bytes | None:
    """What was kept, if it is still what was read."""
    try:
        stored = path.read_bytes()
        os.utime(path)  # used now, so among the last to go
    except OSError:
        return None
    data, checksum = stored[:-CHECKSUM_BYTES], stored[-CHECKSUM_BYTES:]
    return data if xxhash.xxh3_64_digest(data) == checksum else None
