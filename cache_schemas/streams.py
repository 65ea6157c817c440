"""A record's bytes: numbered streams of numbers, packed with pcodec and closed by a checksum.

One idea: a record is a short directory of integer or float arrays, so every profile shares one
container and one hostile-input check. This module knows nothing of probabilities or tokens.

Layout (little-endian):

    "SR" | u8 version | u8 profile | u32 rows | u32 tokens | u16 streams
    then per stream: u8 stream number | u8 dtype and coding | u32 bytes
    then the payloads in the same order, then u64 xxh3-64 of everything before it

How many elements a stream has follows from rows, tokens and the streams before it.
"""

import importlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import xxhash

from stillroom.cache_schemas.errors import FormatTooNew, ShardCorrupt

# A compiled module without type stubs.
pcodec: Any = importlib.import_module("pcodec")
standalone: Any = importlib.import_module("pcodec.standalone")

MAGIC = b"SR"
VERSION = 1
MAX_ELEMENTS = 1 << 26
"""Elements of one stream, at most: 256 MB of int32. Larger counts are refused before allocation."""

FREE_ELEMENTS, MAX_RATIO = 1 << 20, 1 << 10
"""A packed stream of more elements than FREE_ELEMENTS holds at most MAX_RATIO per further byte, so
that a short record cannot ask for much memory; the writer keeps to it by storing numbers raw."""

DTYPES = tuple(np.dtype(name) for name in ("u1", "<u2", "<u4", "<i4", "<f4", "<u8", "<i2"))
Streams = dict[int, np.ndarray]

RAW, PCO, CONSTANT = 0, 1, 2
HEAD = struct.Struct("<2sBBIIH")
LINE = struct.Struct("<BBI")
CHECKSUM_BYTES = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the directory: where a stream's payload lies and what it unpacks to."""

    dtype: np.dtype
    coding: int
    payload: memoryview


@dataclass(frozen=True, slots=True)
class Record:
    """A parsed and checksummed record whose streams are not yet unpacked."""

    profile: int
    rows: int
    tokens: int
    entries: Mapping[int, Entry]

    def stream(self, number: int, count: int, *dtypes: str) -> np.ndarray:
        """Unpack one stream, which must have `count` elements of one of `dtypes`.

        Raises:
            ShardCorrupt: it is absent, is something else or does not unpack.
        """
        entry = self.entries.get(number)
        if entry is None:
            corrupt(f"stream {number} is missing")
        if entry.dtype not in dtypes:
            corrupt(f"stream {number} is {entry.dtype}", " or ".join(dtypes))
        if count > MAX_ELEMENTS:
            corrupt(f"stream {number} would have {count} elements", f"at most {MAX_ELEMENTS}")
        return _unpack(entry, count, number)


def corrupt(found: str, expected: str = "") -> NoReturn:
    """Refuse a record."""
    raise ShardCorrupt(found, expected=expected, where="record")


def pack(profile: int, rows: int, tokens: int, streams: Mapping[int, np.ndarray]) -> bytes:
    """Bytes of a record; streams are written in the order of their numbers."""
    packed = [(number, *_pack(np.ascontiguousarray(streams[number]))) for number in sorted(streams)]
    head = HEAD.pack(MAGIC, VERSION, profile, rows, tokens, len(packed))
    lines = b"".join(LINE.pack(number, kind, len(payload)) for number, kind, payload in packed)
    body = head + lines + b"".join(payload for *_, payload in packed)
    return body + xxhash.xxh3_64_intdigest(body).to_bytes(CHECKSUM_BYTES, "little")


def unpack(blob: bytes | memoryview) -> Record:
    """Check a record's checksum and read its directory.

    Raises:
        ShardCorrupt: the bytes are not a record, or not the bytes that were written.
        FormatTooNew: a later release wrote it.
    """
    view = memoryview(blob)
    if len(view) < HEAD.size + CHECKSUM_BYTES or bytes(view[:2]) != MAGIC:
        corrupt("it does not start as a record", "the bytes 'SR'")
    body, checksum = view[:-CHECKSUM_BYTES], view[-CHECKSUM_BYTES:]
    if xxhash.xxh3_64_intdigest(body) != int.from_bytes(checksum, "little"):
        corrupt("its checksum does not fit its bytes")
    if body[2] > VERSION:
        raise FormatTooNew(
            f"record version {body[2]}",
            expected=f"at most {VERSION}",
            where="record",
            remedy="Update stillroom.",
        )
    return _directory(body)


def _directory(body: memoryview) -> Record:
    _, _, profile, rows, tokens, num_streams = HEAD.unpack_from(body)
    at = HEAD.size + num_streams * LINE.size
    if at > len(body):
        corrupt("its directory is cut short")
    entries: dict[int, Entry] = {}
    for number, kind, length in LINE.iter_unpack(body[HEAD.size : at]):
        dtype, coding = kind & 15, kind >> 4  # four bits each
        if dtype >= len(DTYPES) or coding > CONSTANT or number in entries:
            corrupt(f"stream {number} has an impossible directory line")
        entries[number] = Entry(DTYPES[dtype], coding, body[at : at + length])
        at += length
    if at != len(body):
        corrupt(f"it has {len(body)} bytes", f"{at}")
    return Record(profile, rows, tokens, entries)


def _pack(flat: np.ndarray) -> tuple[int, bytes]:
    """(dtype and coding, payload): the smallest of constant, pcodec and raw."""
    if flat.size > MAX_ELEMENTS:
        raise ValueError(f"a stream of {flat.size} elements; at most {MAX_ELEMENTS}")
    flat = flat.reshape(-1)
    code = DTYPES.index(flat.dtype)
    raw = flat.tobytes()
    if (
        _plausible(flat.size, flat.itemsize)
        and flat.size
        and (flat.view(f"u{flat.itemsize}") == flat.view(f"u{flat.itemsize}")[0]).all()
    ):
        return code | CONSTANT << 4, raw[: flat.itemsize]
    packed = _compress(flat) if flat.size else raw
    if len(packed) < len(raw) and _plausible(flat.size, len(packed)):
        return code | PCO << 4, packed
    return code | RAW << 4, raw


def _plausible(count: int, num_bytes: int) -> bool:
    return count <= FREE_ELEMENTS + MAX_RATIO * num_bytes


def _compress(flat: np.ndarray) -> bytes:
    plain = {}
    if (
        flat.dtype.kind == "u" or flat.itemsize == 2
    ):  # these are coded as they stand: trying for more gains nothing
        plain = {"mode_spec": pcodec.ModeSpec.classic(), "delta_spec": pcodec.DeltaSpec.no_op()}
    config = pcodec.ChunkConfig(compression_level=8, enable_8_bit=True, **plain)
    return standalone.simple_compress(flat, config)


def _unpack(entry: Entry, count: int, number: int) -> np.ndarray:
    if not _plausible(count, len(entry.payload)):
        corrupt(f"stream {number} has {len(entry.payload)} bytes for {count} elements")
    out = np.empty(count, dtype=entry.dtype)
    if entry.coding == PCO:
        _decompress(entry.payload, out, number)
        return out
    raw = np.frombuffer(entry.payload, dtype=np.uint8)
    expected = entry.dtype.itemsize * (count if entry.coding == RAW else 1)
    if raw.size != expected:
        corrupt(f"stream {number} holds {raw.size} bytes", f"{expected} bytes")
    out[:] = raw.view(entry.dtype)  # a constant is one element, repeated
    return out


def _decompress(payload: memoryview, out: np.ndarray, number: int) -> None:
    try:
        progress = standalone.simple_decompress_into(bytes(payload), out)
    except BaseException as error:  # a panic of the Rust library is not an Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        corrupt(f"stream {number} does not unpack ({str(error)[:200]})")
    if progress.n_processed != out.size or not progress.finished:
        corrupt(f"stream {number} does not have {out.size} elements")
