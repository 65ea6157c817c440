"""Scalars of a row as whole steps away from what the lists already say.

One idea: decoded = prediction + step * integer, so the error is at most half a step whatever the
prediction; a good prediction (the token's list entry, the entropy of the list) makes the integers
small. A signal that cannot be coded so (not finite, or enormous) is kept exactly.
"""

import numpy as np

from stillroom.cache_schemas.errors import CacheError
from stillroom.cache_schemas.joined import Joined
from stillroom.cache_schemas.lists import Lists
from stillroom.cache_schemas.streams import Record, Streams

FIRST_STREAM = 48
STEPS = {
    "token_logprob": 1 / 64,
    "entropy": 1 / 64,
    "lse": 1 / 64,
    "logit_mean": 1 / 64,
    "zscore_lse": 1 / 64,
    "behaviour_logprob": 1 / 256,
    "tail_logprob": 1 / 64,
}
"""Step of each signal in nats (profile `small`); the stored value is within half a step."""
STRICT_FINER = 4
"""Profile `strict` divides the steps by this."""
RELATIVE_BITS = 9
"""`logit_std` keeps this many mantissa bits: a relative error of at most 2**-10."""
ORDER = (*STEPS, "logit_std")
TAIL_ENTROPY = 6.0
"""Guess at the entropy, in nats, of a row's distribution given that the token is in its tail."""
LARGEST = 1 << 30


def stream_of(name: str) -> int:
    """Number of a scalar's stream."""
    return FIRST_STREAM + ORDER.index(name)


def encode(name: str, values: np.ndarray, predicted: np.ndarray, finer: int = 1) -> Streams | None:
    """Streams of a float32 array whose first axis is rows; None: it must be kept exactly."""
    if name == "logit_std":
        finite = bool(np.isfinite(values).all() and (values >= 0).all())
        return {stream_of(name): _rounded(values)} if finite else None
    step = STEPS[name] / finer
    with np.errstate(invalid="ignore", over="ignore"):
        steps = np.rint((values.astype(np.float64) - predicted) / step)
    if not (np.abs(steps) < LARGEST).all():
        return None
    _check(name, values, _decoded(steps, predicted, step), step)
    return {stream_of(name): _by_column(steps).astype(np.int32)}


def decode(
    name: str,
    record: Record | Joined,
    predicted: np.ndarray,
    shape: tuple[int, ...],
    finer: int = 1,
) -> np.ndarray:
    """float32 array of `shape`."""
    width = int(np.prod(shape[1:]))
    if name == "logit_std":
        return _from_rounded(record.stream(stream_of(name), "u4", rows=width)).reshape(shape)
    steps = record.by_column(record.stream(stream_of(name), "i4", rows=width), width).reshape(shape)
    return _decoded(steps, predicted, STEPS[name] / finer)


def predict(name: str, lists: Lists | None, places: np.ndarray | None, rows: int) -> np.ndarray:
    """float64 [R]: what the lists say about a scalar; zeros where they say nothing."""
    if lists is not None and name == "entropy":
        return _list_entropy(lists)
    if lists is not None and name == "token_logprob" and places is not None and places.size:
        from stillroom.cache_schemas.kernels.places import entries_at

        found = np.empty(rows)
        entries_at(lists.logprobs, lists.counts, places, found)
        return found
    return np.zeros(rows)


def _list_entropy(lists: Lists) -> np.ndarray:
    from stillroom.cache_schemas.kernels.topk_decoding import list_entropy

    entropy, table = np.empty(len(lists.counts)), lists.table
    rows = lists.levels, lists.counts, lists.logprobs, lists.shifts
    list_entropy(*rows, table.logprobs, table.probabilities, entropy)
    if lists.tail.size:
        tail = np.where(np.isfinite(lists.tail), lists.tail, 0.0).astype(np.float64)
        entropy += np.exp(lists.tail, dtype=np.float64) * (TAIL_ENTROPY - tail)
    return entropy


def _decoded(steps: np.ndarray, predicted: np.ndarray, step: float) -> np.ndarray:
    return (predicted + step * steps).astype(np.float32)


def _by_column(steps: np.ndarray) -> np.ndarray:
    """Columns (temperatures) one after another, so that pcodec may take differences of rows."""
    return np.ascontiguousarray(steps.T).reshape(-1)


def _check(name: str, values: np.ndarray, decoded: np.ndarray, step: float) -> None:
    bound = step / 2 + 2.0**-22 * np.abs(values)
    error = np.abs(values.astype(np.float64) - decoded)
    if (error > bound).any():
        row = int(np.argmax((error - bound).reshape(len(values), -1).max(axis=1)))
        raise CacheError(
            f"coding changes it by {error.max():.3g}",
            expected=f"at most {step / 2:.3g}",
            where=f"signal {name}, row {row}",
        )


def _rounded(values: np.ndarray) -> np.ndarray:
    """uint32: the leading bits of float32, rounded to nearest."""
    drop = 23 - RELATIVE_BITS
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    # Half of what is dropped is added first; 64 bits have room for the carry.
    return ((bits.astype(np.uint64) + (1 << (drop - 1))) >> drop).astype(np.uint32)


def _from_rounded(bits: np.ndarray) -> np.ndarray:
    return (bits << np.uint32(23 - RELATIVE_BITS)).astype(np.uint32).view(np.float32)
