"""One file of a cache, read from its beginning to its end in large pieces and hashed on the way.

One idea: whoever checks a file reads it in order, so the bytes that are hashed are the bytes that
are looked at, one pass is enough, and no more than a piece is in memory. What is asked for out of
order is read by itself.
"""

import errno
import hashlib

from stillroom.cache_schemas.errors import ShardCorrupt
from stillroom.cache_schemas.manifest import FileEntry
from stillroom.pipeline.cache.storage.protocol import Storage

PIECE_BYTES = 1 << 24


class Pieces:
    """A file that is being looked at.

    Raises:
        FileNotFoundError: it is missing.
    """

    def __init__(self, storage: Storage, name: str):
        size = storage.size(name)
        if size is None:
            raise FileNotFoundError(errno.ENOENT, "missing", name)
        self.storage, self.name, self.size = storage, name, size
        self.where = f"{storage.location}/{name}"
        self._start, self._held = 0, b""
        self._digest, self._hashed = hashlib.sha256(), 0

    def range(self, start: int, stop: int) -> memoryview:
        """Some bytes.

        Raises:
            ShardCorrupt: the file does not reach so far.
        """
        if not 0 <= start <= stop <= self.size:
            raise ShardCorrupt(f"has {self.size} bytes", expected=f"{stop}", where=self.where)
        if not self.holds(start, stop):
            self._read(start if self.size > PIECE_BYTES else 0, stop)
        return memoryview(self._held)[start - self._start : stop - self._start]

    def holds(self, start: int, stop: int) -> bool:
        """Whether these bytes are in memory."""
        return self._start <= start and stop <= self._start + len(self._held)

    def entry(self) -> FileEntry:
        """Size and sha256 of the whole file."""
        while self._hashed < self.size:
            self.range(self._hashed, min(self._hashed + PIECE_BYTES, self.size))
        return FileEntry(bytes=self.size, sha256=self._digest.hexdigest())

    def _read(self, start: int, stop: int) -> None:
        length = min(max(stop - start, PIECE_BYTES), self.size - start)
        self._held, self._start = self.storage.read(self.name, start, length), start
        if start <= self._hashed < start + length:
            self._digest.update(memoryview(self._held)[self._hashed - start :])
            self._hashed = start + length
