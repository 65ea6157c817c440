"""A reader of dense signals written from FORMAT.md alone: NumPy, a Blosc, crc32c, none of our code.

One idea: sections 4 and 7, as short as they can be. It trusts what the caller has hashed.
"""

import struct

import google_crc32c
import numpy as np
from numcodecs import blosc

from tests.golden.mini_record_reader import Streams


def chunk_of(shard: bytes, position: int, per_shard: int) -> bytes:
    """Section 4: the chunk of one example, by the index at the end of a Zarr shard."""
    index = shard[-(16 * per_shard + 4) :]
    assert struct.pack("<I", google_crc32c.value(index[:-4])) == index[-4:]
    offset, length = struct.unpack_from("<QQ", index, 16 * position)
    assert offset != 2**64 - 1, "a chunk that the index lacks is damage"
    return shard[offset : offset + length]


def decode(chunk: bytes, facts: dict, used: int) -> np.ndarray:
    """Section 7: float32 [positions used, width]."""
    body, positions, width = chunk[:-4], facts["positions"], facts["width"]
    assert struct.pack("<I", google_crc32c.value(body)) == chunk[-4:]
    name, step = facts["codec"]["name"], facts["codec"]["step"]
    if name == "bf16":
        bits = np.frombuffer(blosc.decompress(body), "<u2").astype(np.uint32) << 16
        whole = bits.view(np.float32).reshape(positions, width)
    elif name == "fp16":
        halves = np.frombuffer(blosc.decompress(body), "<f2")
        whole = halves.astype(np.float32).reshape(positions, width)
    else:
        whole = row_scaled(body, name, step, positions, width)
    return whole[:used]


def row_scaled(body: bytes, form: str, step: float, positions: int, width: int) -> np.ndarray:
    """float32 [positions, width]; positions that are not stored are zeros."""
    streams = Streams(body)
    assert streams.profile == {"step": 16, "int8": 17, "fp8": 18}[form]
    assert streams.tokens == width
    rows, out = streams.rows, np.zeros((positions, width), np.float32)
    scales = (streams(0, rows).astype(np.uint32) << 16).view(np.float32)[:, None]  # [R, 1]
    if form == "step":
        groups, offsets = streams(1, width), streams(2, width).astype(np.int64)
        whole = np.zeros((rows, width), np.int64)
        for group in range(8):
            channels = np.flatnonzero(groups == group)
            own = streams(8 + group, rows * len(channels)).reshape(rows, len(channels))
            whole[:, channels] = own + offsets[channels]
        factor = (scales.astype(np.float64) * step).astype(np.float32)
        out[:rows] = whole.astype(np.float32) * factor
    else:
        bits = streams(8, rows * width).reshape(rows, width)
        numbers = bits.view(np.int8).astype(np.float32) if form == "int8" else _e4m3()[bits]
        out[:rows] = numbers * scales
    return out


def _e4m3() -> np.ndarray:
    """float32 [256]: sign, four bits of exponent (bias 7), three of mantissa, no infinities."""
    values = []
    for byte in range(256):
        exponent, mantissa = byte >> 3 & 15, byte & 7
        size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
        values.append(-size if byte >> 7 else size)
    return np.array(values, np.float32)
