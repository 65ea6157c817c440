"""A record's bytes: numbered streams of numbers, packed with pcodec and closed by a checksum.

One idea: a record is a short directory of integer or float arrays, so every profile shares one
container and one hostile-input check. This module knows nothing of probabilities or tokens.

Layout (little-endian; `v` is an unsigned LEB128 number of at most five bytes):

    "SR" | u8 version | u8 profile | v rows | v tokens | v streams
    then per stream: u8 stream id | u8 dtype and coding | v count | v bytes
    then the payloads in the same order, then u64 xxh3-64 of everything before it
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import xxhash

from cache_schemas.errors import FormatTooNew, ShardCorrupt

MAGIC = b"SR"
VERSION = 1
MAX_ELEMENTS = 1 << 26
"""Elements of one stream, at most: 256 MB of int32. Larger counts are refused before allocation."""

DTYPES = tuple(np.dtype(name) for name in ("u1", "<u2", "<u4", "<i4", "<f4", "<u8"))
RAW, PCO, CONSTANT = 0, 1, 2
CHECKSUM_BYTES = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the directory: where a stream's payload lies and what it unpacks to."""

    dtype: np.dtype
    coding: int
    count: int
    payload: memoryview


@dataclass(frozen=True, slots=True)
class Record:
    """A parsed and checksummed record whose streams are not yet unpacked."""

    profile: int
    rows: int
    tokens: int
    entries: Mapping[int, Entry]

    def stream(self, number: int, count: int) -> np.ndarray:
        """Unpack one stream, which must have `count` elements.

        Raises:
            ShardCorrupt: it is absent, has another count or does not unpack.
        """
        entry = self.entries.get(number)
        if entry is None:
            corrupt(f"stream {number} is missing")
        if entry.count != count:
            corrupt(f"stream {number} has {entry.count} elements", f"{count}")
        return _unpack(entry, number)


def corrupt(found: str, expected: str = "") -> NoReturn:
    """Refuse a record."""
    raise ShardCorrupt(found, expected=expected, where="record")


def pack(profile: int, rows: int, tokens: int, streams: Mapping[int, np.ndarray]) -> bytes:
    """Bytes of a record; streams are written in the order of their numbers."""
    packed = [(number, *_pack(np.ascontiguousarray(streams[number]))) for number in sorted(streams)]
    head = bytearray(MAGIC + bytes((VERSION, profile)))
    head += _varint(rows) + _varint(tokens) + _varint(len(packed))
    for number, kind, count, payload in packed:
        head += bytes((number, kind)) + _varint(count) + _varint(len(payload))
    body = bytes(head) + b"".join(payload for *_, payload in packed)
    return body + xxhash.xxh3_64_intdigest(body).to_bytes(CHECKSUM_BYTES, "little")


def unpack(blob: bytes | memoryview) -> Record:
    """Check a record's checksum and read its directory.

    Raises:
        ShardCorrupt: the bytes are not a record, or not the bytes that were written.
        FormatTooNew: a later release wrote it.
    """
    view = memoryview(blob)
    if len(view) < len(MAGIC) + 2 + CHECKSUM_BYTES or bytes(view[:2]) != MAGIC:
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
    rows, at = _read_varint(body, 4)
    tokens, at = _read_varint(body, at)
    number_of_streams, at = _read_varint(body, at)
    lines, lengths = [], []
    for _ in range(number_of_streams):
        if at + 2 > len(body):
            corrupt("its directory is cut short")
        number, kind = body[at], body[at + 1]
        count, at = _read_varint(body, at + 2)
        length, at = _read_varint(body, at)
        lines.append((number, kind, count))
        lengths.append(length)
    return Record(body[3], rows, tokens, _entries(body[at:], lines, lengths))


def _entries(payloads: memoryview, lines: list, lengths: list[int]) -> dict[int, Entry]:
    if sum(lengths) != len(payloads):
        corrupt(f"its payloads have {len(payloads)} bytes", f"{sum(lengths)} bytes")
    entries, at = {}, 0
    for (number, kind, count), length in zip(lines, lengths):
        dtype, coding = kind & 15, kind >> 4
        if dtype >= len(DTYPES) or coding > CONSTANT or count > MAX_ELEMENTS or number in entries:
            corrupt(f"stream {number} has an impossible directory line")
        entries[number] = Entry(DTYPES[dtype], coding, count, payloads[at : at + length])
        at += length
    return entries


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(view: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 35, 7):
        if at >= len(view):
            break
        value |= (view[at] & 127) << shift
        at += 1
        if view[at - 1] < 128:
            return value, at
    corrupt("a number in its directory is cut short")


def _pack(array: np.ndarray) -> tuple[int, int, bytes]:
    """(dtype and coding, count, payload): the smallest of constant, pcodec and raw."""
    if array.size > MAX_ELEMENTS:
        raise ValueError(f"a stream of {array.size} elements; at most {MAX_ELEMENTS}")
    flat = array.reshape(-1)
    code = DTYPES.index(flat.dtype)
    raw = flat.tobytes()
    size = flat.dtype.itemsize
    if flat.size and raw == raw[:size] * flat.size:
        return code | CONSTANT << 4, flat.size, raw[:size]
    if flat.size:
        packed = _compress(flat)
        if len(packed) < len(raw):
            return code | PCO << 4, flat.size, packed
    return code | RAW << 4, flat.size, raw


def _compress(flat: np.ndarray) -> bytes:
    from pcodec import ChunkConfig, standalone  # pyright: ignore[reportAttributeAccessIssue]

    return standalone.simple_compress(flat, ChunkConfig(compression_level=8, enable_8_bit=True))


def _unpack(entry: Entry, number: int) -> np.ndarray:
    out = np.empty(entry.count, dtype=entry.dtype)
    if entry.coding == PCO:
        _decompress(entry.payload, out, number)
        return out
    raw = np.frombuffer(entry.payload, dtype=np.uint8)
    expected = entry.dtype.itemsize * (entry.count if entry.coding == RAW else 1)
    if raw.size != expected or (entry.coding == CONSTANT and not entry.count):
        corrupt(f"stream {number} holds {raw.size} bytes", f"{expected} bytes")
    out[:] = raw.view(entry.dtype)
    return out


def _decompress(payload: memoryview, out: np.ndarray, number: int) -> None:
    from pcodec import standalone  # pyright: ignore[reportAttributeAccessIssue]

    try:
        with warnings.catch_warnings():
            progress = standalone.simple_decompress_into(bytes(payload), out)
    except BaseException as error:  # a panic of the Rust library is not an Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        corrupt(f"stream {number} does not unpack ({str(error)[:200]})")
    if progress.n_processed != out.size or not progress.finished:
        corrupt(f"stream {number} unpacks to {progress.n_processed} elements", f"{out.size}")
