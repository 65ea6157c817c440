"""Many records at once: those of one kind, laid end to end, decode as one.

One idea: nearly every stream goes row by row, so the streams of many short records, one after
another, are those of one long record, and the same loops decode them at a fraction of the cost.
Directories and plain payloads are read as arrays; only what pcodec packed is unpacked one by one.
What does not go row by row (columns, tokens before the rows) is put in order here. How many
elements each record must bring is checked for each by itself, so what is refused alone is refused
here too; which record it was is not told (`streams.parse` tells).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from stillroom.cache_schemas import streams
from stillroom.cache_schemas.lists import Lists
from stillroom.cache_schemas.streams import CHECKSUM_BYTES, CONSTANT, HEAD, LINE, PCO, corrupt

HEADS = np.dtype(
    [
        ("magic", "S2"),
        ("version", "u1"),
        ("profile", "u1"),
        ("rows", "<u4"),
        ("tokens", "<u4"),
        ("streams", "<u2"),
    ]
)
LINES = np.dtype([("number", "u1"), ("kind", "u1"), ("bytes", "<u4")])


@dataclass(frozen=True, slots=True)
class Decoded:
    """Some records, one after another.

    Attributes:
        places: int64 [N]: which of the records that were asked for these are.
        rows, tokens: int64 [N] of each.
        signals: as of one record of all rows and all tokens.
        lists: their top-k lists as they are coded, where the profile codes them.
    """

    places: np.ndarray
    rows: np.ndarray
    tokens: np.ndarray
    signals: dict[str, np.ndarray]
    lists: Lists | None


class Joined:
    """Several records behind the interface of one; made by `joined`.

    Args:
        data: bytes of all records.
        heads: `HEADS` [N].
        lines: `LINES` [N, streams], alike in their numbers.
        payloads: int64 [N, streams] where each payload begins in `data`.

    Attributes:
        rows_of, tokens_of: int64 [N] of each record.
    """

    def __init__(self, data: bytes, heads: np.ndarray, lines: np.ndarray, payloads: np.ndarray):
        self._data, self._lines, self._payloads = data, lines, payloads
        self._bytes = np.frombuffer(data, dtype=np.uint8)
        self.profile = int(heads["profile"][0])
        self.entries = {number: at for at, number in enumerate(lines["number"][0].tolist())}
        self.rows_of = heads["rows"].astype(np.int64)
        self.tokens_of = heads["tokens"].astype(np.int64)
        self.rows, self.tokens = int(self.rows_of.sum()), int(self.tokens_of.sum())

    def stream(
        self,
        number: int,
        *dtypes: str,
        rows: int | np.ndarray = 0,
        tokens: int = 0,
        once: int = 0,
    ) -> np.ndarray:
        """As `Record.stream`; elements of all records, in order, in the widest of their dtypes."""
        if number not in self.entries:
            corrupt(f"stream {number} is missing")
        at = self.entries[number]
        counts = self._of_rows(rows) + tokens * self.tokens_of + once  # [N]
        kinds, sizes = self._lines["kind"][:, at], self._lines["bytes"][:, at].astype(np.int64)
        self._check(number, dtypes, counts, sizes, kinds)
        known = np.unique(kinds).tolist()
        widest = max((streams.KINDS[kind][0] for kind in known), key=lambda dtype: dtype.itemsize)
        out = np.empty(int(counts.sum()), dtype=widest)
        for kind in known:
            own = np.flatnonzero(kinds == kind)
            self._fill(out, counts, own, self._payloads[own, at], sizes[own], kind, number)
        return out

    def by_column(self, flat: np.ndarray, width: int) -> np.ndarray:
        """[R, width] of a stream that holds the columns of a record one after another."""
        before, within = _places(self.rows_of)
        step = np.repeat(self.rows_of, self.rows_of)  # from one column to the next
        at = (before * width + within)[:, None] + np.arange(width) * step[:, None]
        return flat[at]

    def in_order(self, prompt: np.ndarray, following: np.ndarray) -> np.ndarray:
        """All tokens, record by record, of those before the ones that follow a row and of these."""
        _, within = _places(self.tokens_of)
        first = np.repeat(self.tokens_of - self.rows_of, self.tokens_of)
        tokens = np.empty(self.tokens, dtype=prompt.dtype)
        tokens[within < first], tokens[within >= first] = prompt, following
        return tokens

    def _of_rows(self, each: int | np.ndarray) -> np.ndarray:
        """int64 [N]: the elements that each record's rows ask for."""
        if isinstance(each, int):
            return each * self.rows_of
        ends = np.cumsum(self.rows_of)
        sums = np.concatenate([[0], np.cumsum(each, dtype=np.int64)])
        return sums[ends] - sums[ends - self.rows_of]

    def _check(self, number: int, dtypes: tuple[str, ...], counts, sizes, kinds) -> None:
        """Refuse counts and sizes that cannot be, before anything is allocated for them."""
        for kind in np.unique(kinds).tolist():
            dtype, coding = streams.KINDS[kind]
            if dtype not in dtypes:
                corrupt(f"stream {number} is {dtype}", " or ".join(dtypes))
            own = kinds == kind
            expected = dtype.itemsize * (1 if coding == CONSTANT else counts[own])
            if coding != PCO and (sizes[own] != expected).any():
                corrupt(f"stream {number} does not have the bytes of its elements")
        if (counts < 0).any() or (counts > streams.MAX_ELEMENTS).any():
            corrupt(f"stream {number} would have {counts.max()} elements")
        if (counts > streams.FREE_ELEMENTS + streams.MAX_RATIO * sizes).any():
            corrupt(f"stream {number} has few bytes for {counts.max()} elements")

    def _fill(self, out, counts, own, payloads, sizes, kind: int, number: int) -> None:
        """Put the elements of the records `own`, which have one kind of this stream, in place."""
        dtype, coding = streams.KINDS[kind]
        ends = np.cumsum(counts)
        if coding == PCO:
            starts, stops = (ends - counts)[own].tolist(), ends[own].tolist()
            for start, stop, at, size in zip(starts, stops, payloads.tolist(), sizes.tolist()):
                self._unpack(out[start:stop], dtype, self._data[at : at + size], number)
            return
        packed = self._gathered(payloads, sizes).view(dtype)
        values = packed if coding != CONSTANT else np.repeat(packed, counts[own])
        if len(own) == len(counts):
            out[:] = values
        else:
            held = np.zeros(len(counts), dtype=bool)
            held[own] = True
            out[np.repeat(held, counts)] = values

    def _gathered(self, payloads: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Bytes of some payloads, end to end."""
        if len(sizes) == 1:
            return self._bytes[int(payloads[0]) :][: int(sizes[0])]
        return self._bytes[np.repeat(payloads, sizes) + _places(sizes)[1]]

    def _unpack(self, out: np.ndarray, dtype: np.dtype, payload: bytes, number: int) -> None:
        target = out if out.dtype == dtype else np.empty(out.size, dtype=dtype)
        streams.decompress(payload, target, number)
        if target is not out:
            out[:] = target


def joined(
    blobs: Sequence[bytes | memoryview], most_rows: int, marks: Sequence[int] = ()
) -> Iterator[tuple[np.ndarray, Joined]]:
    """Records in groups that decode as one, each with the places of its records.

    Args:
        most_rows: rows that are decoded together; a longer record is decoded alone.
        marks: numbers of streams whose very bytes must be equal within a group.

    Raises:
        ShardCorrupt: one is not a record, or not the bytes that were written.
    """
    data, starts, heads = _heads(blobs)
    for count in np.unique(heads["streams"]).tolist():
        own = np.flatnonzero(heads["streams"] == count)
        lines, payloads = _lines(data, starts, own, count)
        for places in _alike(data, heads[own], lines, payloads, marks):
            for part in _parts(places, heads[own], most_rows):
                yield own[part], Joined(data, heads[own[part]], lines[part], payloads[part])


def _alike(
    data: bytes, heads: np.ndarray, lines: np.ndarray, payloads: np.ndarray, marks: Sequence[int]
) -> Iterator[np.ndarray]:
    """Places of records with the same profile, streams and marks, all or none of which have more
    tokens than rows."""
    longer = heads["tokens"] > heads["rows"]
    kinds = [head + bytes([long]) for head, long in zip(_texts(lines["number"]), longer.tolist())]
    kinds = [kind + bytes([profile]) for kind, profile in zip(kinds, heads["profile"].tolist())]
    groups: dict[bytes, list[int]] = {}
    for at, kind in enumerate(kinds):
        groups.setdefault(kind, []).append(at)
    for places in groups.values():
        numbers = lines["number"][places[0]].tolist()
        if len(set(numbers)) < len(numbers):
            corrupt("a stream is listed twice")
        marked: dict[tuple, list[int]] = {}
        held = [numbers.index(mark) for mark in marks if mark in numbers]
        sizes, begins = lines["bytes"][:, held].tolist(), payloads[:, held].tolist()
        codes = lines["kind"][:, held].tolist()
        for at in places:
            own = [data[begin : begin + size] for begin, size in zip(begins[at], sizes[at])]
            marked.setdefault((*own, *codes[at]), []).append(at)
        yield from (np.array(group) for group in marked.values())


def _texts(numbers: np.ndarray) -> list[bytes]:
    """The bytes of every row."""
    flat, width = numbers.tobytes(), numbers.shape[1]
    return [flat[at * width : (at + 1) * width] for at in range(len(numbers))]


def _heads(blobs: Sequence[bytes | memoryview]) -> tuple[bytes, np.ndarray, np.ndarray]:
    """(all bytes, where each record begins, and one place behind the last; heads)."""
    sizes = np.array([len(blob) for blob in blobs], dtype=np.int64)
    if sizes.min(initial=HEAD.size + CHECKSUM_BYTES) < HEAD.size + CHECKSUM_BYTES:
        corrupt("it does not start as a record", "the bytes 'SR'")
    data = b"".join(blobs)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    every = np.frombuffer(data, dtype=np.uint8)
    heads = every[starts[:-1, None] + np.arange(HEAD.size)].view(HEADS)[:, 0]
    found = [xxhash.xxh3_64_intdigest(blob[:-CHECKSUM_BYTES]) for blob in blobs]
    sums = every[starts[1:, None] + np.arange(-CHECKSUM_BYTES, 0)].view("<u8")[:, 0]
    if (heads["magic"] != streams.MAGIC).any() or (heads["version"] != streams.VERSION).any():
        corrupt("it does not start as a record of this version")
    if (sums != np.array(found, dtype=np.uint64)).any():
        corrupt("its checksum does not fit its bytes")
    return data, starts, heads


def _lines(
    data: bytes, starts: np.ndarray, own: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """(`LINES` [N, count], int64 [N, count] where the payloads begin) of some records."""
    first = starts[own] + HEAD.size
    ends = starts[own + 1] - CHECKSUM_BYTES
    if (first + count * LINE.size > ends).any():
        corrupt("its directory is cut short")
    every = np.frombuffer(data, dtype=np.uint8)
    lines = every[first[:, None] + np.arange(count * LINE.size)].view(LINES)
    lines = lines.reshape(len(own), count)
    sizes = lines["bytes"].astype(np.int64)
    payloads = (first + count * LINE.size)[:, None] + np.cumsum(sizes, axis=1) - sizes
    if (first + count * LINE.size + sizes.sum(axis=1) != ends).any():
        corrupt("its payloads do not fill it")
    if set(np.unique(lines["kind"]).tolist()) - streams.KINDS.keys():
        corrupt("a stream has an impossible directory line")
    return lines, payloads


def _parts(places: np.ndarray, heads: np.ndarray, most_rows: int) -> Iterator[np.ndarray]:
    """Consecutive places whose rows and tokens are not too many together."""
    sizes = np.maximum(heads["rows"], heads["tokens"])[places].tolist()
    begin, rows = 0, 0
    for at, size in enumerate(sizes):
        if at > begin and rows + size > most_rows:
            yield places[begin:at]
            begin, rows = at, 0
        rows += size
    yield places[begin:]


def _places(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(elements before the record, place within it) of every element of records of these sizes."""
    before = np.repeat(np.cumsum(sizes) - sizes, sizes)
    return before, np.arange(len(before)) - before
