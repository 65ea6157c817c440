"""One dense signal as one Zarr v3 array, sharded: shape [examples, positions, width].

One idea: an inner chunk is one example, so a Zarr shard is the examples' encoded chunks one after
another and an index. We lay out and look up that index ourselves, because a reader must tell a
missing chunk from zeros and must not pay a request to do so; the chunk's own bytes are Zarr's. Any
Zarr library opens the result as an ordinary array. Which codec a chunk has is `dense_codec.py`'s
business; shorter examples are padded with zeros.
"""

import struct
from typing import Any

import google_crc32c
import numpy as np
import zarr
import zarr.codecs
import zarr.storage

from cache_schemas.errors import ShardCorrupt

MISSING = (1 << 64) - 1
_CHECKSUM = 4


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
        self.index_bytes = 16 * per_shard + _CHECKSUM

    def metadata(self) -> bytes:
        """Content of the array's zarr.json."""
        store = zarr.storage.MemoryStore()
        shape = (self.num_examples, self.positions, self.width)
        shards = (self.per_shard, *shape[1:])
        self._create(store, shape, shards)
        return store._store_dict["zarr.json"].to_bytes()

    def encode(self, array: np.ndarray) -> bytes:
        """The chunk of one example; float32 [positions used, width].

        Raises:
            ValueError: the array does not fit the signal's shape.
        """
        used, width = array.shape
        if used > self.positions or width != self.width:
            raise ValueError(f"shape {array.shape}; at most ({self.positions}, {self.width})")
        store = zarr.storage.MemoryStore()
        chunk = self._create(store, (1, self.positions, self.width), None)
        padded = np.zeros((1, self.positions, self.width), dtype=np.float32)
        padded[0, :used] = array
        chunk[...] = padded
        return store._store_dict["c/0/0/0"].to_bytes()

    def decode(self, chunk: bytes, used: int, where: str) -> np.ndarray:
        """The first `used` positions of one example.

        Raises:
            ShardCorrupt: the bytes are not such a chunk.
        """
        if used > self.positions:
            raise ShardCorrupt(
                f"{used} positions", expected=f"at most {self.positions}", where=where
            )
        from zarr.core.buffer import default_buffer_prototype

        buffer = default_buffer_prototype().buffer.from_bytes(chunk)
        store = zarr.storage.MemoryStore()
        array = self._create(store, (1, self.positions, self.width), None)
        store._store_dict["c/0/0/0"] = buffer
        try:
            return np.asarray(array[0, :used])
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

    def _create(self, store: Any, shape: tuple, shards: tuple | None) -> zarr.Array:
        return zarr.create_array(
            store=store,
            shape=shape,
            chunks=(1, *shape[1:]),
            shards=shards,
            dtype="float32",
            fill_value=0.0,
            compressors=[zarr.codecs.ZstdCodec(level=3), zarr.codecs.Crc32cCodec()],
            config={"write_empty_chunks": True},
        )
