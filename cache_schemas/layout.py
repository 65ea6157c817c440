"""Where everything lies in a cache, as paths relative to its root.

One idea: every path follows from a shard number or a signal name, so no path is ever read from a
file and none can lead out of the cache. No folder gets more than 1,000 shards' entries, except the
chunk folder of a Zarr array, whose names Zarr fixes.
"""

import re

PLAN = "plan.json"
CODEC = "codec.json"
MANIFEST = "manifest.json"
DEFINITION = "definition.json"
SIGNATURE = "manifest.sig"
STAGING = "tmp"
STAGED_BYTES = 8
"""Of the random number that names a staging directory."""
SHARDS_PER_FOLDER = 1000


def is_staged(name: str) -> bool:
    """Whether something under `tmp/` has a name that we give: a staging directory or a claim."""
    return re.fullmatch(rf"[0-9a-f]{{{2 * STAGED_BYTES}}}|claim-[0-9]{{6,}}", name) is not None


def leads_out(name: str) -> bool:
    """Whether a name is none of a cache's file, because as a path it could lead elsewhere."""
    return any(part in ("", ".", "..") for part in name.split("/"))


def folder(shard: int) -> str:
    """Name of the folder that holds a shard's files below `rows/` and `receipts/`."""
    return f"{shard // SHARDS_PER_FOLDER:03d}"


def rows(shard: int) -> str:
    """Arrow IPC file: what every training step reads."""
    return f"rows/{folder(shard)}/{shard:06d}.arrow"


def receipt(shard: int) -> str:
    """The commit of a shard."""
    return f"receipts/{folder(shard)}/{shard:06d}.json"


def claim(shard: int) -> str:
    """Held by whoever is at work on a shard; gone from a sealed cache."""
    return f"{STAGING}/claim-{shard:06d}"


def index(number: int) -> str:
    """Parquet index of the shards `1000 * number ...`."""
    return f"index/{number:03d}.parquet"


def table(digest: str) -> str:
    """A codec's table, named by its content."""
    return f"tables/{digest}.npy"


DENSE_GROUP = "dense/zarr.json"
"""The Zarr group of all dense signals, for plain tools; not in a copy that lacks some, where
it would promise arrays that read as zeros."""


def dense_metadata(signal: str) -> str:
    """Metadata of a dense signal's Zarr array."""
    return f"dense/{signal}/zarr.json"


def dense_shard(signal: str, shard: int) -> str:
    """The Zarr shard that holds the examples of one shard."""
    return f"dense/{signal}/c/{shard}/0/0"


def shard_files(shard: int, dense: list[str] | tuple[str, ...]) -> list[str]:
    """The files that make up a shard, the receipt not counted."""
    return [rows(shard), *(dense_shard(name, shard) for name in dense)]
