"""One dense signal as one Zarr v3 array, sharded: shape [examples, positions, width].

One idea: an inner chunk is one example, so a Zarr shard is the examples' encoded chunks one after
another and an index. We lay out and look up that index ourselves, because a reader must tell a
missing chunk from zeros and must not pay a request to do so; the chunk's own bytes are Zarr's. Any
Zarr library opens the result as an ordinary array; we decode a chunk without one, and of it only
what is used. Which codec a chunk has is `dense_codec.py`'s business; shorter examples are padded
with zeros.
"""

import json
import struct
import threading
from collections.abc import Mapping
from typing import Any

import google_crc32c
import numpy as np
import zarr
import zarr.storage
from zarr.core.buffer import default_buffer_prototype

from stillroom.cache_schemas import canonical, dense_codec
from stillroom.cache_schemas.errors import ShardCorrupt

MISSING = (1 << 64) - 1
MAX_METADATA = 1 << 16
_CHECKSUM = 4
_CHUNK = "c/0/0/0"


class DenseArray:
    """Encodes and decodes the shards of one dense signal.

    Args:
        num_examples, per_shard, positions, width: sizes of the array; `positions` at most.
        codec: JSON description of the chunk codec, as in the plan.
    """

    def __init__(
        self, num_examples: int, per_shard: int, positions: int, width: int, codec: dict[str, Any]
    ):
        self.num_examples, self.per_shard = num_examples, per_shard
        self.positions, self.width, self.codec = positions, width, codec
        self._own = threading.local()
        self.index_bytes = 16 * per_shard + _CHECKSUM  # offset and length, 8 bytes each; a CRC32C

    def __reduce__(self) -> tuple:
        """As another process makes it anew: without the stores that threads hold."""
        shape = self.num_examples, self.per_shard, self.positions, self.width
        return type(self), (*shape, self.codec)

    def metadata(self) -> bytes:
        """Content of the array's zarr.json."""
        store = zarr.storage.MemoryStore()
        shape = (self.num_examples, self.positions, self.width)
        self._create(store, shape, (self.per_shard, *shape[1:]))
        return store._store_dict["zarr.json"].to_bytes()

    def check_metadata(self, data: bytes, where: str) -> None:
        """Refuse a zarr.json that does not describe this array, or by other codecs.

        Raises:
            ShardCorrupt: it does not.
        """
        if len(data) > MAX_METADATA:
            raise ShardCorrupt(f"has {len(data):,} bytes", where=where)
        canonical.parse(data, where)
        try:
            found, own = _described(data), _described(self.metadata())
        except Exception as error:
            text = f"is no Zarr metadata ({str(error)[:120]})"
            raise ShardCorrupt(text, where=where) from None
        if different := sorted(key for key in own if found.get(key) != own[key]):
            found = f"'{different[0]}' is not the plan's"
            raise ShardCorrupt(found, where=where)

    def encode(self, array: np.ndarray) -> bytes:
        """The chunk of one example; float32 [positions used, width].

        Raises:
            ValueError: the array does not fit the signal's shape.
            CacheError: the codec cannot hold a value within its bound.
        """
        used, width = array.shape
        if used > self.positions or width != self.width:
            raise ValueError(f"shape {array.shape}; at most ({self.positions}, {self.width})")
        store, chunk = self._one_chunk()
        stored = dense_codec.to_stored(self.codec, array)
        padded = np.zeros(chunk.shape, dtype=stored.dtype)
        padded[0, :used] = stored
        chunk[...] = padded
        encoded = store._store_dict.pop(_CHUNK).to_bytes()
        self.decode(encoded, used, "a dense chunk")  # what a reader would refuse is not written
        return encoded

    def decode(self, chunk: bytes, used: int, where: str) -> np.ndarray:
        """The first `used` positions of one example.

        Raises:
            ShardCorrupt: the bytes are not such a chunk.
        """
        if not 0 <= used <= self.positions:
            limit = f"at most {self.positions}"
            raise ShardCorrupt(f"{used} positions", expected=limit, where=where)
        body, checksum = chunk[:-_CHECKSUM], chunk[-_CHECKSUM:]
        if struct.pack("<I", google_crc32c.value(body)) != checksum:
            raise ShardCorrupt("a chunk does not fit its checksum", where=where)
        if used * self.width > dense_codec.FREE_ELEMENTS + dense_codec.MAX_RATIO * len(body):
            found = f"a chunk of {len(body):,} bytes for {used} positions of {self.width}"
            raise ShardCorrupt(found, where=where)
        self._check_header(chunk, where)
        try:
            return dense_codec.decode(self.codec, body, used, self.width)
        except ShardCorrupt:
            raise
        except Exception as error:
            raise ShardCorrupt(f"does not decode ({str(error)[:120]})", where=where) from None

    def pack(self, chunks: list[bytes]) -> bytes:
        """A Zarr shard of the chunks of its examples (fewer in the last shard)."""
        offset, entries = 0, []
        for chunk in chunks:
            entries.append((offset, len(chunk)))
            offset += len(chunk)
        entries += [(MISSING, MISSING)] * (self.per_shard - len(chunks))
        index = b"".join(struct.pack("<QQ", *entry) for entry in entries)
        return b"".join(chunks) + index + struct.pack("<I", google_crc32c.value(index))

    def parse_index(self, tail: bytes, size: int, num_examples: int, where: str) -> np.ndarray:
        """uint64 [examples, 2] of offset and length, from the last `index_bytes` of a shard.

        Raises:
            ShardCorrupt: the index is damaged, or a chunk is missing or outside the shard.
        """
        index, checksum = tail[:-_CHECKSUM], tail[-_CHECKSUM:]
        if (
            len(tail) != self.index_bytes
            or struct.pack("<I", google_crc32c.value(index)) != checksum
        ):
            raise ShardCorrupt("its index does not fit its checksum", where=where)
        entries = np.frombuffer(index, dtype="<u8").reshape(-1, 2)[:num_examples]
        if (entries == MISSING).any():
            raise ShardCorrupt("a chunk is missing", where=where)
        limit = size - self.index_bytes
        if (entries > limit).any() or (entries.sum(axis=1) > limit).any():
            raise ShardCorrupt("a chunk lies outside the shard", where=where)
        return entries

    def _check_header(self, chunk: bytes, where: str) -> None:
        """Blosc allocates and reads what its header says: refuse all but the chunk's own sizes."""
        if self.codec["name"] not in ("bf16", "fp16"):
            return
        unpacked = 2 * self.positions * self.width  # bytes
        if len(chunk) < 16 + _CHECKSUM:
            raise ShardCorrupt(f"{len(chunk)} bytes are no Blosc chunk", where=where)
        sizes = struct.unpack_from("<III", chunk, 4)
        expected = (unpacked, min(sizes[1], unpacked), len(chunk) - _CHECKSUM)
        if sizes != expected or chunk[3] != 2:
            raise ShardCorrupt(f"Blosc header {sizes}", expected=f"{expected}", where=where)

    def _one_chunk(self) -> tuple[zarr.storage.MemoryStore, zarr.Array]:
        """This thread's array of a single chunk; making one takes milliseconds."""
        if not hasattr(self._own, "made"):
            store = zarr.storage.MemoryStore()
            self._own.made = store, self._create(store, (1, self.positions, self.width), None)
        return self._own.made

    def _create(self, store: Any, shape: tuple, shards: tuple | None) -> zarr.Array:
        return zarr.create_array(
            store=store,
            shape=shape,
            chunks=(1, *shape[1:]),
            shards=shards,
            config={"write_empty_chunks": True},
            **dense_codec.chain(self.codec),
        )


def group_metadata(arrays: Mapping[str, DenseArray]) -> bytes:
    """Content of the zarr.json of the group of all dense signals: what a plain tool opens, metadata
    of every array in it, so that it needs no listing."""
    held = {name: json.loads(array.metadata()) for name, array in sorted(arrays.items())}
    about = (
        "Dense signals of a stillroom cache, one array each; shape [examples, positions, width]."
    )
    group = {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {dense_codec.HOW_TO_READ: about},
        "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": held},
    }
    return json.dumps(group, indent=2).encode()


def check_group(data: bytes, arrays: Mapping[str, DenseArray], where: str) -> None:
    """Refuse a group that does not describe exactly these arrays.

    Raises:
        ShardCorrupt: it does not.
    """
    if len(data) > MAX_METADATA * (1 + len(arrays)):
        raise ShardCorrupt(f"has {len(data):,} bytes", where=where)
    found = canonical.parse(data, where)
    expected = json.loads(group_metadata(arrays))
    held = _held(found)
    if held.keys() != arrays.keys() or _bare(found) != _bare(expected):
        raise ShardCorrupt("is not the group of the plan's dense signals", where=where)
    for name, array in arrays.items():
        array.check_metadata(json.dumps(held[name]).encode(), where)


def _held(group: Any) -> dict[str, Any]:
    """Metadata of the arrays that a group says it has."""
    inner = group.get("consolidated_metadata") if isinstance(group, dict) else None
    held = inner.get("metadata") if isinstance(inner, dict) else None
    return held if isinstance(held, dict) else {}


def _bare(group: dict[str, Any]) -> dict[str, Any]:
    """A group without its arrays and its words for people."""
    inner = {k: v for k, v in group["consolidated_metadata"].items() if k != "metadata"}
    return _without_words(group) | {"consolidated_metadata": inner}


def _without_words(node: dict[str, Any]) -> dict[str, Any]:
    attributes = node.get("attributes")
    if not isinstance(attributes, Mapping):
        return node
    said = {k: v for k, v in attributes.items() if k != dense_codec.HOW_TO_READ}
    return {**node, "attributes": said}


def _described(metadata: bytes) -> dict[str, Any]:
    """What a zarr.json says, defaults written out, words for people left out."""
    store = zarr.storage.MemoryStore()
    store._store_dict["zarr.json"] = default_buffer_prototype().buffer.from_bytes(metadata)
    return _without_words(dict(zarr.open_array(store, mode="r").metadata.to_dict()))
