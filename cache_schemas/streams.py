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

FREE_ELEMENTS, MAX_RATIO = 1 << 20, 1 << 6
"""A packed stream of more elements than FREE_ELEMENTS holds at most MAX_RATIO per further byte, so
that a short record cannot ask for much memory; the writer keeps to it by storing numbers raw."""

DTYPES = tuple(np.dtype(name) for name in ("u1", "<u2", "<u4", "<i4", "<f4", "<u8", "<i2"))
Streams = dict[int, np.ndarray]

RAW, PCO, CONSTANT = 0, 1, 2
KINDS = {
    number | coding << 4: (dtype, coding)  # four bits each
    for number, dtype in enumerate(DTYPES)
    for coding in (RAW, PCO, CONSTANT)
}
HEAD = struct.Struct("<2sBBIIH")
LINE = struct.Struct("<BBI")
CHECKSUM_BYTES = 8


Entry = tuple[np.dtype, int, memoryview]
"""One line of the directory: element type, coding and payload of a stream."""


@dataclass(frozen=True, slots=True)
class Record:
    """A parsed and checksummed record whose streams are not yet unpacked."""

    profile: int
    rows: int
    tokens: int
    entries: Mapping[int, Entry]

    def stream(
        self,
        number: int,
        *dtypes: str,
        rows: int | np.ndarray = 0,
        tokens: int = 0,
        once: int = 0,
    ) -> np.ndarray:
        """Unpack one stream of one of `dtypes`, of as many elements as all of these ask for.

        Args:
            rows: elements of every row, or of each [R].
            tokens: elements of every token.
            once: elements besides.

        Raises:
            ShardCorrupt: it is absent, is something else or does not unpack.
        """
        entry = self.entries.get(number)
        if entry is None:
            corrupt(f"stream {number} is missing")
        if entry[0] not in dtypes:
            corrupt(f"stream {number} is {entry[0]}", " or ".join(dtypes))
        of_rows = rows * self.rows if isinstance(rows, int) else int(rows.sum(dtype=np.int64))
        count = of_rows + tokens * self.tokens + once
        if not 0 <= count <= MAX_ELEMENTS:
            corrupt(f"stream {number} would have {count} elements", f"at most {MAX_ELEMENTS}")
        return unpack(entry, count, number)

    def by_column(self, flat: np.ndarray, width: int) -> np.ndarray:
        """[R, width] of a stream that holds one column after another."""
        return flat.reshape(width, self.rows).T

    def in_order(self, prompt: np.ndarray, following: np.ndarray) -> np.ndarray:
        """All tokens, of those before the ones that follow a row and of these."""
        return np.concatenate([prompt, following])


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


def parse(blob: bytes | memoryview) -> Record:
    """Check a record's checksum and read its directory; `joined.py` unpacks many at once.

    Raises:
        ShardCorrupt: the bytes are not a record, or not the bytes that were written.
        FormatTooNew: a later release wrote it.
    """
    view = memoryview(blob).cast("B")
    if len(view) < HEAD.size + CHECKSUM_BYTES or bytes(view[:2]) != MAGIC:
        corrupt("it does not start as a record", "the bytes 'SR'")
    body, checksum = view[:-CHECKSUM_BYTES], view[-CHECKSUM_BYTES:]
    if xxhash.xxh3_64_intdigest(body) != int.from_bytes(checksum, "little"):
        corrupt("its checksum does not fit its bytes")
    if body[2] < 1:
        corrupt(f"record version {body[2]}", f"{VERSION}")
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
        if kind not in KINDS or number in entries:
            corrupt(f"stream {number} has an impossible directory line")
        end = at + length
        entries[number] = (*KINDS[kind], body[at:end])
        at = end
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


def unpack(entry: Entry, count: int, number: int) -> np.ndarray:
    """All elements of a stream.

    Raises:
        ShardCorrupt: it does not have exactly `count`.
    """
    dtype, coding, payload = entry
    if not _plausible(count, len(payload)):
        corrupt(f"stream {number} has {len(payload)} bytes for {count} elements")
    out = np.empty(count, dtype=dtype)
    if coding == PCO:
        decompress(payload, out, number)
        return out
    expected = dtype.itemsize * (count if coding == RAW else 1)
    if len(payload) != expected:
        corrupt(f"stream {number} holds {len(payload)} bytes", f"{expected} bytes")
    out[:] = np.frombuffer(payload, dtype=dtype)  # a constant fills it
    return out


def decompress(payload: bytes | memoryview, out: np.ndarray, number: int) -> None:
    """Fill `out` with what pcodec packed."""
    try:
        progress = standalone.simple_decompress_into(bytes(payload), out)
    except BaseException as error:  # a panic of the Rust library is not an Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        corrupt(f"stream {number} does not unpack ({str(error)[:200]})")
    if progress.n_processed != out.size or not progress.finished:
        corrupt(f"stream {number} does not have {out.size} elements")
