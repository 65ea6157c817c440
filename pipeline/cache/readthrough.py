"""A local copy of what was read from far away, of bounded size.

One idea: a range that was read is a file named by the hash of what was asked for; the oldest go
when the folder grows too large. What a file holds is checked when it is used again, and a bad one
is fetched anew. Writing is refused: it belongs to the storage behind.
"""

import contextlib
import hashlib
import os
import threading
from pathlib import Path

import xxhash

from cache_schemas.errors import CacheError
from pipeline.cache.storage import Claim, Disk, Storage

CHECKSUM_BYTES = 8


class ReadThrough:
    """A storage whose reads are kept in a directory.

    Args:
        behind: where a miss is read from.
        directory: where ranges are kept; several processes may share it.
        limit_bytes: what the directory may hold.
    """

    def __init__(self, behind: Storage, directory: str | Path, limit_bytes: int):
        self.behind, self.location = behind, behind.location
        self.directory, self.limit_bytes = Path(directory), limit_bytes
        self.directory.mkdir(parents=True, exist_ok=True)
        self._used = sum(entry.stat().st_size for entry in os.scandir(self.directory))
        self._lock = threading.Lock()

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        asked = f"{self.location}\n{name}\n{start}\n{length}".encode()
        path = self.directory / hashlib.sha256(asked).hexdigest()
        data = _kept(path)
        if data is None:
            data = self.behind.read(name, start, length)
            self._keep(path, data)
        return data

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

    def claim(self, name: str) -> Claim | None:
        return self.behind.claim(name)

    def _keep(self, path: Path, data: bytes) -> None:
        """Store a range; a full disk only means that it is not kept."""
        if len(data) + CHECKSUM_BYTES > self.limit_bytes:
            return
        temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
        with contextlib.suppress(OSError):
            temporary.write_bytes(data + xxhash.xxh3_64_digest(data))
            Disk().rename(temporary, path)
        with self._lock:
            self._used += len(data) + CHECKSUM_BYTES
            if self._used > self.limit_bytes:
                self._evict()

    def _evict(self) -> None:
        """Remove what was used longest ago until a tenth of the room is free."""
        entries = sorted(os.scandir(self.directory), key=lambda entry: entry.stat().st_mtime_ns)
        self._used = sum(entry.stat().st_size for entry in entries)
        for entry in entries:
            if self._used <= self.limit_bytes * 9 // 10:
                return
            with contextlib.suppress(FileNotFoundError):
                size = entry.stat().st_size
                os.unlink(entry.path)
                self._used -= size


def _kept(path: Path) -> bytes | None:
    """What was kept, if it is still what was read."""
    try:
        stored = path.read_bytes()
        os.utime(path)
    except OSError:
        return None
    data, checksum = stored[:-CHECKSUM_BYTES], stored[-CHECKSUM_BYTES:]
    return data if xxhash.xxh3_64_digest(data) == checksum else None
