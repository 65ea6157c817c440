"""Where the messages of an Arrow IPC file lie, read from its framing and nothing else.

One idea: a message says itself how long it is, and a few fields of its flatbuffers metadata are all
that must be known before pyarrow may be let at it: its length, that it is a record batch, and that
its buffers are not compressed (pyarrow would allocate whatever size such a buffer names). The
footer, by which other tools find the messages, must name the same ones. It parses no values.
"""

import struct

import numpy as np

from stillroom.cache_schemas.errors import ShardCorrupt

MAGIC, FIRST_MESSAGE = b"ARROW1", 8
"""First message behind the magic and its padding."""
PREFIX, CONTINUES = 8, 0xFFFFFFFF
"""Bytes of continuation mark and metadata length, and the mark."""
RECORD_BATCH = 3
MAX_METADATA, MAX_MESSAGE = 1 << 20, 1 << 28
"""Bytes of a message's metadata, and of one whole: the largest example that can be kept."""
TAIL = 10
"""Length of the footer, 4 bytes, and the magic again."""
BLOCK = np.dtype([("at", "<i8"), ("metadata", "<i4"), ("pad", "<i4"), ("body", "<i8")])


def metadata_bytes(prefix: bytes | memoryview, where: str) -> int:
    """Length of a message's metadata, from its first 8 bytes; 0 at the end of the stream."""
    if len(prefix) < PREFIX:
        raise ShardCorrupt("is not an Arrow file (it is cut short)", where=where)
    mark, length = struct.unpack_from("<II", prefix)
    if mark != CONTINUES or length > MAX_METADATA:
        raise ShardCorrupt("is not an Arrow file (no message where one should be)", where=where)
    return length


def message_bytes(start: bytes | memoryview, where: str) -> int:
    """Length of a whole message, from its prefix and metadata.

    Raises:
        ShardCorrupt: it is no message, or longer than an example may be.
    """
    try:
        return _message_bytes(start, where)
    except (struct.error, IndexError):
        raise ShardCorrupt("is not an Arrow file (a message)", where=where) from None


def _message_bytes(start: bytes | memoryview, where: str) -> int:
    body, header = _field_of(start, 3), _field_of(start, 2)
    length = struct.unpack_from("<q", start, body)[0] if body else 0
    total = PREFIX + struct.unpack_from("<I", start, 4)[0] + length
    if header == 0 or length < 0 or total > MAX_MESSAGE:
        found = f"a message of {total} bytes"
        raise ShardCorrupt(found, expected=f"at most {MAX_MESSAGE}", where=where)
    return total


def is_compressed(message: bytes | memoryview) -> bool:
    """True if a message declares compressed buffers, or is no record batch that can be understood.

    The field is `compression`, the fourth of the table RecordBatch, the third field of Message.
    """
    try:
        kind, header = _field_of(message, 1), _field_of(message, 2)
        batch = header + struct.unpack_from("<I", message, header)[0]
        known = kind and message[kind] == RECORD_BATCH and header
        return not known or _field(message, batch, 3) != 0
    except (struct.error, IndexError):
        return True


def check_footer(footer: bytes | memoryview, bounds: np.ndarray, where: str) -> None:
    """Refuse a footer that names other record batches than lie in the file.

    Args:
        footer: all bytes behind the last message: end of stream, footer, length, magic.
        bounds: int64 [N, 2] start and end of every message.
    """
    try:
        length, magic = struct.unpack_from("<I", footer, len(footer) - TAIL)[0], footer[-6:]
        table = bytes(footer[-TAIL - length : -TAIL])
        vector = _field(table, struct.unpack_from("<I", table)[0], 3)
        vector += struct.unpack_from("<I", table, vector)[0]
        count = struct.unpack_from("<I", table, vector)[0]
        blocks = np.frombuffer(table, dtype=BLOCK, count=count, offset=vector + 4)
    except (struct.error, ValueError):
        raise ShardCorrupt("is not an Arrow file (no footer)", where=where) from None
    ends = blocks["at"] + blocks["metadata"] + blocks["body"]
    same = len(blocks) == len(bounds) and (blocks["at"] == bounds[:, 0]).all()
    if magic != MAGIC or not same or (ends != bounds[:, 1]).any():
        raise ShardCorrupt("its footer names other examples than it holds", where=where)


def _field_of(message: bytes | memoryview, number: int) -> int:
    """Position of a field of the table Message; 0 if it is not set."""
    return _field(message, PREFIX + struct.unpack_from("<I", message, PREFIX)[0], number)


def _field(message: bytes | memoryview, table: int, number: int) -> int:
    """Position of a field of a flatbuffers table; 0 if it is not set."""
    vtable = table - struct.unpack_from("<i", message, table)[0]
    size = struct.unpack_from("<H", message, max(vtable, 0))[0]
    slot = 4 + 2 * number
    offset = struct.unpack_from("<H", message, vtable + slot)[0] if slot < size else 0
    return table + offset if offset else 0
