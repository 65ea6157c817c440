"""Lossy bytes of rows of floats, each row scaled by itself.

One idea: a row is one scale and small numbers, in one of three forms:

- `step`: whole steps of `step * rms(row)`; |error| <= step * rms / 2 everywhere and the normalised
  squared error is step^2 / 12. Channels lose their median and are sorted by spread into groups, so
  that pcodec codes each group with a code of its own: 5.5 bits at step 0.05.
- `int8`: 1/127 of the row's largest value per step; |error| <= max / 252.
- `fp8`: e4m3 with the row's largest value at 448; |error| <= max(|x| / 16, max * 2^-18).

The container is that of records (`streams`); trailing rows of zeros are not stored. Bounds are
checked on write. No Zarr here.
"""

import functools

import numpy as np

from stillroom.cache_schemas import streams
from stillroom.cache_schemas.errors import CacheError

FORMS = {"step": 16, "int8": 17, "fp8": 18}
"""Profile byte of the container."""
SCALES, GROUPS, OFFSETS, VALUES = 0, 1, 2, 8
NUM_GROUPS = 8
FP8_MAX = 448.0


def encode(rows: np.ndarray, form: str, step: float) -> bytes:
    """Bytes of float32 [R, width].

    Raises:
        CacheError: the bound does not hold (a value that is not finite).
    """
    used = _used(rows)
    kept = rows[:used]
    parts = _to_steps(kept, step) if form == "step" else _to_bytes(kept, form)
    blob = streams.pack(FORMS[form], used, rows.shape[1], parts)
    _check(kept, decode(blob, used, rows.shape[1], form, step), form, step)
    return blob


def decode(blob: bytes, num_rows: int, width: int, form: str, step: float) -> np.ndarray:
    """float32 [num_rows, width].

    Raises:
        ShardCorrupt: the bytes are not such rows.
    """
    record = streams.parse(blob)
    if record.profile != FORMS[form] or record.rows > num_rows or record.tokens != width:
        found = f"form {record.profile}, {record.rows} rows of {record.tokens}"
        streams.corrupt(found, f"form {FORMS[form]}, at most {num_rows} rows of {width}")
    out = np.zeros((num_rows, width), dtype=np.float32)
    scales = _scales(record.stream(SCALES, "u2", rows=1))
    if form == "step":
        _from_steps(record, scales, step, out[: record.rows])
    else:
        values = record.stream(VALUES, "u1", rows=width)
        numbers = _signed_bytes() if form == "int8" else _fp8_values()
        rows = numbers[values].reshape(record.rows, width)
        np.multiply(rows, scales[:, None], out=out[: record.rows])
    return out


def _to_steps(rows: np.ndarray, step: float) -> streams.Streams:
    bits = _scale_bits(np.sqrt(np.square(rows, dtype=np.float64).mean(axis=1)), up=False)
    scales = _scales(bits).astype(np.float64) * step
    # [R, width]; a row of zeros has scale 0 and stays zeros.
    steps = np.rint(rows / np.where(scales > 0, scales, 1)[:, None]).astype(np.int32)
    offsets = np.rint(np.median(steps, axis=0)) if len(rows) else np.zeros(rows.shape[1])  # [width]
    offsets = offsets.astype(np.int32)
    steps -= offsets
    groups = _groups(steps)
    parts = {SCALES: bits, GROUPS: groups, OFFSETS: offsets}
    for group in range(NUM_GROUPS):
        own = np.ascontiguousarray(steps[:, groups == group]).reshape(-1)
        narrow = np.abs(own).max(initial=0) < 1 << 15
        parts[VALUES + group] = own.astype(np.int16) if narrow else own
    return parts


def _from_steps(record: streams.Record, scales: np.ndarray, step: float, out: np.ndarray) -> None:
    rows, width = out.shape
    groups = record.stream(GROUPS, "u1", once=width)
    if groups.max(initial=0) >= NUM_GROUPS:
        streams.corrupt(f"channel group {groups.max()}", f"below {NUM_GROUPS}")
    offsets = record.stream(OFFSETS, "i4", once=width).astype(np.int64)
    for group in range(NUM_GROUPS):
        channels = np.flatnonzero(groups == group)
        own = record.stream(VALUES + group, "i2", "i4", rows=len(channels))
        out[:, channels] = own.reshape(rows, len(channels)) + offsets[channels]
    out *= (scales.astype(np.float64) * step).astype(np.float32)[:, None]


def _groups(steps: np.ndarray) -> np.ndarray:
    """uint8 [width]: channels in groups of equal size by rising spread."""
    order = np.argsort(
        np.abs(steps).mean(axis=0) if len(steps) else steps.sum(axis=0), kind="stable"
    )
    groups = np.empty(steps.shape[1], dtype=np.uint8)
    groups[order] = np.arange(len(order)) * NUM_GROUPS // max(len(order), 1)
    return groups


def _to_bytes(rows: np.ndarray, form: str) -> streams.Streams:
    largest = np.abs(rows).max(axis=1, initial=0).astype(np.float64)
    bits = _scale_bits(largest / (127.0 if form == "int8" else FP8_MAX), up=True)
    scales = _scales(bits)
    scaled = rows / np.where(scales > 0, scales, 1)[:, None]
    values = np.rint(scaled).astype(np.int8).view(np.uint8) if form == "int8" else _to_fp8(scaled)
    return {SCALES: bits, VALUES: values.reshape(-1)}


def _scale_bits(scales: np.ndarray, up: bool) -> np.ndarray:
    """uint16: the leading bits of float32, rounded away from or towards zero, so that a scale
    keeps its bound."""
    bits = scales.astype(np.float32).view(np.uint32)
    if up:
        bits = np.where(scales > 0, bits + 0xFFFF, bits)  # what is cut off would shrink the scale
    return (bits >> 16).astype(np.uint16)


def _scales(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_fp8(scaled: np.ndarray) -> np.ndarray:
    """uint8 e4m3 bits of the nearest value."""
    values = _fp8_values()[:127]  # 0 to 448; byte 127 is NaN
    middles = (values[1:] + values[:-1]) / 2  # between them: searching rounds to nearest
    bits = np.searchsorted(middles, np.abs(scaled)).astype(np.uint8)
    return bits | (np.signbit(scaled).astype(np.uint8) << 7)


@functools.cache
def _fp8_values() -> np.ndarray:
    """float32 [256]: value of each e4m3 (fn) byte; the two NaN bytes are never written, and 0."""
    bits = np.arange(128)
    exponent, mantissa = bits >> 3, bits & 7
    normal = (8 + mantissa) * 2.0 ** (exponent - 10.0)
    positive = np.where(exponent == 0, mantissa * 2.0**-9, normal)
    positive[127] = 0.0
    return np.concatenate([positive, -positive]).astype(np.float32)


@functools.cache
def _signed_bytes() -> np.ndarray:
    return np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32)


def _used(rows: np.ndarray) -> int:
    """Rows up to the last that is not all zeros."""
    nonzero = np.flatnonzero(rows.any(axis=1))
    return int(nonzero[-1]) + 1 if nonzero.size else 0


def _check(rows: np.ndarray, decoded: np.ndarray, form: str, step: float) -> None:
    error = np.abs(rows.astype(np.float64) - decoded)
    bound = _bound(rows.astype(np.float64), form, step)
    if not (error <= bound * (1 + 1e-5) + 1e-37).all():
        row = int(np.argmax((error - bound).max(axis=1)))
        raise CacheError(
            f"codec '{form}' changes a value by {error[row].max():.3g}",
            expected=f"at most {bound[row].max():.3g}",
            where=f"dense signal, position {row}",
        )


def _bound(rows: np.ndarray, form: str, step: float) -> np.ndarray:
    largest = np.abs(rows).max(axis=1, initial=0, keepdims=True)
    if form == "step":
        rms = np.sqrt(np.square(rows).mean(axis=1, keepdims=True))
        return np.broadcast_to(step * rms / 2, rows.shape) + 2.0**-22 * np.abs(rows)
    if form == "int8":
        return np.broadcast_to(largest / 252, rows.shape)
    return np.maximum(np.abs(rows) / 16, largest * 2.0**-18)
