"""Where a cache lies: a few operations on named bytes, whatever holds them.

One idea: a file is written whole, made durable, and appears under its name at once and only if
nothing has that name, or it does not appear. Everything above relies on this and on nothing else:
no locks, no appends, no renames over finished files.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Protocol

from stillroom.cache_schemas import canonical, layout
from stillroom.cache_schemas.errors import CacheError, ShardCorrupt


class Storage(Protocol):
    """Named bytes under one root. Names are relative and come from `cache_schemas.layout`."""

    location: str
    """The root, for messages; never holds credentials."""

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """A file, or exactly `length` bytes of it from `start`.

        Raises:
            FileNotFoundError: no such file.
            ShardCorrupt: the file ends too early, cannot be read from its disk, or is larger than
                any file of that name may be.
        """
        ...

    def forget(self, name: str, start: int = 0, length: int | None = None) -> None:
        """Keep nothing of such a read, which gave something wrong: the next one asks again."""
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

    def strangers(self) -> tuple[str, ...]:
        """What lies directly under the root and is no cache's doing (staging is)."""
        ...

    def claim(self, name: str) -> "Claim | None":
        """Hold a name until it is released or this process ends; None if another process does.

        Where the storage cannot tell the living from the dead, everyone gets a claim: it saves
        double work and guards nothing.
        """
        ...

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Within it no other holds the same, where the storage has locks: for a file that is read
        and then written."""
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


def check_vacant(storage: Storage) -> None:
    """Refuse to begin a cache among somebody's other files.

    Raises:
        CacheError: there are some, and no cache.
    """
    if storage.size(layout.PLAN) is not None or storage.size(layout.MANIFEST) is not None:
        return
    if found := storage.strangers():
        raise CacheError(
            f"holds {', '.join(repr(name) for name in found[:3])} and no cache",
            expected="a place that is empty, or that a cache was begun in",
            where=storage.location,
            remedy="Choose another place.",
        )


MOST_BYTES = {"json": canonical.MAX_BYTES, "sig": 1 << 16, "md": 1 << 20, "npy": 1 << 27}
"""Kind of file -> bytes that one may have; `canonical` parses no more JSON."""
MOST_BYTES_OF_DATA = 1 << 34


def most_bytes(name: str) -> int:
    """What a file of that name may have, if it is read whole."""
    return MOST_BYTES.get(name.rpartition(".")[2], MOST_BYTES_OF_DATA)


def check_whole(where: str, found: int, most: int) -> None:
    """Refuse to read a file whole that is larger than any of its kind."""
    if found > most:
        raise ShardCorrupt(
            f"has {found:,} bytes or more",
            expected=f"at most {most:,}",
            where=where,
            remedy="Do not use this copy; ask its publisher.",
        )


TRIES = 3
IsRight = Callable[[bytes], bool]


def read_right(
    storage: Storage,
    name: str,
    is_right: IsRight,
    start: int = 0,
    length: int | None = None,
) -> bytes | None:
    """What `Storage.read` gives, asked for again while it is wrong: one wrong answer on the way is
    no wrong file. None if it stays wrong."""
    for _ in range(TRIES):
        data = storage.read(name, start, length)
        if is_right(data):
            return data
        storage.forget(name, start, length)
    return None


def looks_like_a_document(data: bytes) -> bool:
    """False for a page of a server and for half a document, which the next answer may mend."""
    return data.startswith(b"{") and data.endswith(b"}\n")


def cut_short(where: str, found: int, expected: int) -> None:
    """Refuse a file that ends too early."""
    raise ShardCorrupt(
        f"has {max(found, 0)} bytes left",
        expected=f"{expected}",
        where=where,
        remedy="Get it again.",
    )
