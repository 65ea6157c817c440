"""A cache as it stood when its manifest was first read.

One idea: the manifest names every byte of a cache, so whoever reads it once and sees that reading
ever after deals with one cache, whatever happens at the other side meanwhile: what is checked (its
signature, its digest), what is read and what is copied hang on the same bytes. Everything else is
the storage's own business.
"""

import contextlib
from pathlib import Path

from stillroom.cache_schemas import layout
from stillroom.cache_schemas.errors import CacheError
from stillroom.pipeline.cache.storage.protocol import (
    Claim,
    Storage,
    looks_like_a_document,
    read_right,
)


class Snapshot:
    """Another storage, whose manifest is read once."""

    def __init__(self, storage: Storage):
        self._storage, self.location = storage, storage.location
        self._manifest: bytes | None = None

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        if name != layout.MANIFEST:
            return self._storage.read(name, start, length)
        if self._manifest is None:
            data = read_right(self._storage, name, looks_like_a_document)
            self._manifest = self._storage.read(name) if data is None else data
        return self._manifest[start:] if length is None else self._manifest[start : start + length]

    def forget(self, name: str, start: int = 0, length: int | None = None) -> None:
        self._storage.forget(name, start, length)

    def check_still_there(self) -> None:
        """Refuse to go on with a cache that was replaced by another while it was read.

        Raises:
            CacheError: the manifest there is not the one that was read.
        """
        if self._storage.read(layout.MANIFEST) != self.read(layout.MANIFEST):
            raise CacheError(
                "another cache has been published there meanwhile",
                where=self.location,
                remedy="Start again with what is there now, in another place; or name the commit "
                "or version that you mean.",
            )

    def size(self, name: str) -> int | None:
        return self._storage.size(name)

    def list(self, folder: str) -> dict[str, int]:
        return self._storage.list(folder)

    def create(self, name: str, source: bytes | Path) -> bool:
        return self._storage.create(name, source)

    def replace(self, name: str, data: bytes) -> None:
        self._storage.replace(name, data)

    def delete(self, name: str) -> None:
        self._storage.delete(name)

    def staging(self) -> contextlib.AbstractContextManager[Path]:
        return self._storage.staging()

    def sweep(self) -> None:
        self._storage.sweep()

    def strangers(self) -> tuple[str, ...]:
        return self._storage.strangers()

    def claim(self, name: str) -> Claim | None:
        return self._storage.claim(name)

    def alone(self) -> contextlib.AbstractContextManager[None]:
        return self._storage.alone()


def pinned(storage: Storage) -> Snapshot:
    """The storage with its manifest pinned; one that is pinned already stays as it is."""
    return storage if isinstance(storage, Snapshot) else Snapshot(storage)
