"""A copy of a cache that lacks some dense signals, and says so.

One idea: `partial.json` in the copy lists the dense signals that are there; everything else,
including the manifest, is the original's, so hashes and signatures still hold. It copies nothing.
"""

from stillroom.cache_schemas import canonical
from stillroom.cache_schemas.errors import ShardCorrupt
from stillroom.pipeline.cache.storage.protocol import Storage, looks_like_a_document, read_right

PARTIAL = "partial.json"


def present_signals(storage: Storage) -> tuple[str, ...] | None:
    """Dense signals of a partial copy; None where all are there."""
    where = f"{storage.location}/{PARTIAL}"
    try:
        if storage.size(PARTIAL) is None:
            return None
        data = read_right(storage, PARTIAL, looks_like_a_document)
    except FileNotFoundError:  # what was there first was a page of the server
        return None
    listed = canonical.check(data or b"", where).get("dense")
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise ShardCorrupt("does not list signals", where=where)
    return tuple(listed)


def mark(storage: Storage, dense: list[str] | None) -> None:
    """Record what is there; None: everything."""
    if dense is None:
        storage.delete(PARTIAL)
    else:
        storage.replace(PARTIAL, listing(dense))


def listing(dense: list[str]) -> bytes:
    """The file that says that these dense signals are there."""
    return canonical.sign({"dense": sorted(dense)})
