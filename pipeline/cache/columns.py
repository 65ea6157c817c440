"""Many examples of a cache as arrays, one entry per example or one example after another.

One idea: what is asked of a cache as a whole (does it make sense, what does the index say) is asked
of whole arrays, so no Python object is made for an example. Ragged arrays lie end to end beside
their sizes. It judges only what it cannot be built without; meaning is `care/meaning.py`'s.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from stillroom.cache_schemas import frames, rows
from stillroom.cache_schemas.errors import ShardCorrupt
from stillroom.cache_schemas.lists import Lists
from stillroom.cache_schemas.record_codec import TOKENS, Decoded
from stillroom.cache_schemas.signals import EXAMPLE_SIGNALS, ROW_SIGNALS
from stillroom.pipeline.cache.formats import Format
from stillroom.pipeline.cache.pieces import Pieces
from stillroom.pipeline.record import Example, ImageSpan, TeacherRecord

PART_EXAMPLES = 2048


@dataclass(frozen=True, slots=True)
class Ragged:
    """Arrays of several examples, end to end.

    Attributes:
        flat: their elements.
        sizes: int64 [N] elements of each.
    """

    flat: np.ndarray
    sizes: np.ndarray

    @property
    def ends(self) -> np.ndarray:
        """int64 [N]: where each ends."""
        return np.cumsum(self.sizes)

    def of(self, at: int) -> np.ndarray:
        """One example's."""
        end = int(self.sizes[: at + 1].sum())
        return self.flat[end - int(self.sizes[at]) : end]


@dataclass(frozen=True, slots=True)
class Columns:
    """Some examples; N of them, with R rows and T tokens in all.

    Attributes:
        numbers: int64 [N] places in the cache.
        ids, documents, sources: text, each [N].
        weights, first_rows: float64, int64 [N].
        tokens, mask, positions: int32, bool, int32 of every example.
        dense_lengths: as stored, of every example.
        images: spans of each, where the plan has images.
        num_rows: int64 [N].
        rows: row signals [R, ...].
        lists: those of the rows as they are coded, where the profile codes any.
        whole: example signals.
    """

    numbers: np.ndarray
    ids: list[str]
    documents: list[str]
    sources: list[str]
    weights: np.ndarray
    first_rows: np.ndarray
    tokens: Ragged
    mask: Ragged
    positions: Ragged
    dense_lengths: Ragged
    images: list[tuple[ImageSpan, ...]]
    num_rows: np.ndarray
    rows: dict[str, np.ndarray]
    lists: Lists | None = None
    whole: dict[str, Ragged] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.numbers)

    def example(self, at: int) -> Example:
        """One example by itself."""
        return Example(
            example_id=self.ids[at],
            document_id=self.documents[at],
            source=self.sources[at],
            token_ids=self.tokens.of(at),
            loss_mask=self.mask.of(at),
            images=self.images[at] if self.images else (),
            weight=float(self.weights[at]),
        )

    @classmethod
    def of_record(cls, record: TeacherRecord, number: int = 0) -> "Columns":
        """One record's."""
        example = record.example
        one = np.array([number])

        def alone(array: np.ndarray) -> Ragged:
            return Ragged(np.asarray(array), np.array([len(array)]))

        return cls(
            numbers=one,
            ids=[example.example_id],
            documents=[example.document_id],
            sources=[example.source],
            weights=np.array([example.weight], dtype=np.float64),
            first_rows=np.array([record.first_row]),
            tokens=alone(example.token_ids),
            mask=alone(example.loss_mask),
            positions=alone(record.hidden_positions),
            dense_lengths=alone(one[:0]),
            images=[example.images],
            num_rows=np.array([record.num_rows]),
            rows={n: array for n, array in record.signals.items() if n in ROW_SIGNALS},
            whole={n: alone(a) for n, a in record.signals.items() if n in EXAMPLE_SIGNALS},
        )


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive examples of one rows file.

    Attributes:
        numbers: their places in the cache.
        bounds: int64 [N, 2] where the message of each begins and ends in the file.
        messages: their bytes.
        table: what is in them, a row each.
    """

    numbers: range
    bounds: np.ndarray
    messages: memoryview
    table: pa.Table

    def alone(self, at: int) -> "Part":
        """One of them."""
        table = self.table.slice(at, 1).combine_chunks()
        own = slice(at, at + 1)
        return Part(self.numbers[own], self.bounds[own], self.message(at), table)

    def message(self, at: int) -> memoryview:
        """The message of one example."""
        start, stop = (int(place) for place in self.bounds[at] - self.bounds[0, 0])
        return self.messages[start:stop]


def parts(file: Pieces, form: Format, numbers: range) -> Iterator[Part]:
    """The examples of a rows file, as many at a time as lie in one piece of it.

    Raises:
        ShardCorrupt: it is not the rows file of these examples.
    """
    at = _first_message(file, form.schema)
    every = np.empty((len(numbers), 2), dtype=np.int64)
    done = 0
    while done < len(numbers):
        bounds = _within_a_piece(file, at, min(len(numbers) - done, PART_EXAMPLES))
        at, stop = int(bounds[-1, 1]), done + len(bounds)
        every[done:stop] = bounds
        messages = file.range(int(bounds[0, 0]), at)
        own = numbers[done:stop]
        table = rows.parse_many(messages, len(bounds), form.schema, file.where)
        if (table.column("number").to_numpy() != np.arange(own.start, own.stop)).any():
            raise ShardCorrupt("holds other examples", expected=f"{own}", where=file.where)
        yield Part(own, bounds, messages, table)
        done = stop
    if frames.metadata_bytes(file.range(at, min(at + frames.PREFIX, file.size)), file.where):
        raise ShardCorrupt("more examples", expected=f"{len(numbers)}", where=file.where)
    frames.check_footer(file.range(at, file.size), every, file.where)


def _first_message(file: Pieces, schema: pa.Schema) -> int:
    """Where the first example's message begins; the schema before it must be the plan's."""
    start = frames.FIRST_MESSAGE
    size = _message_bytes(file, start)
    head = file.range(0, start + size)
    try:
        found = pa.ipc.read_schema(pa.py_buffer(bytes(head[start:])))
    except (pa.ArrowException, OSError, EOFError, ValueError) as error:
        text = f"is not an Arrow file ({str(error)[:120]})"
        raise ShardCorrupt(text, where=file.where) from None
    if bytes(head[: len(frames.MAGIC)]) != frames.MAGIC or not found.equals(schema):
        raise ShardCorrupt("has another schema than the plan's", where=file.where)
    return start + size


def _within_a_piece(file: Pieces, at: int, most: int) -> np.ndarray:
    """int64 [N, 2]: bounds of the next messages that are in memory together; at least one."""
    bounds: list[tuple[int, int]] = []
    while len(bounds) < most:
        if bounds and not file.holds(at, at + frames.PREFIX):
            break
        size = _message_bytes(file, at)
        if bounds and not file.holds(bounds[0][0], at + size):
            break
        if frames.is_compressed(file.range(at, at + size)):
            raise ShardCorrupt("is not a plain record batch", where=file.where)
        bounds.append((at, at + size))
        at += size
    return np.array(bounds, dtype=np.int64)


def _message_bytes(file: Pieces, at: int) -> int:
    stop = min(at + frames.PREFIX, file.size)
    length = frames.metadata_bytes(file.range(at, max(at, stop)), file.where)
    if not length:
        raise ShardCorrupt("fewer examples than the plan's", where=file.where)
    return frames.message_bytes(file.range(at, at + frames.PREFIX + length), file.where)


def columns_of(part: Part, form: Format) -> Iterator[tuple[np.ndarray, Columns]]:
    """The examples of a part with everything decoded, in groups, each with its places in the part.

    Raises:
        ShardCorrupt: an example's columns contradict each other.
    """
    table = part.table
    masks = _ragged(table, "loss_mask").sizes
    if form.portable:
        yield np.arange(len(masks)), _columns(part, table, _plain_rows(table, form, masks), form)
        return
    blobs = [memoryview(value.as_buffer()) for value in table.column(rows.PAYLOAD).chunk(0)]
    num_rows = _num_rows(table, masks)
    _check_heads(blobs, num_rows if form.plan.row_signals else 0 * num_rows, masks)
    for decoded in form.codec.decode_many(blobs):
        whole = len(decoded.places) == len(blobs)
        own = table if whole else table.take(pa.array(decoded.places))
        yield decoded.places, _columns(part, own, decoded, form)


def _num_rows(table: pa.Table, tokens: np.ndarray) -> np.ndarray:
    """int64 [N]: rows of examples of so many tokens each."""
    return np.maximum(tokens - 1 - table.column("first_row").to_numpy(), 0)


def _check_heads(blobs: Sequence[memoryview], num_rows: np.ndarray, tokens: np.ndarray) -> None:
    """Refuse records whose numbers of rows and tokens are not what their examples have, before
    anything is allocated for them."""
    heads = [bytes(blob[4:12]) if len(blob) >= 12 else bytes(8) for blob in blobs]
    found = np.frombuffer(b"".join(heads), dtype="<u4").reshape(-1, 2)
    if (found[:, 0] != num_rows).any() or (found[:, 1] != tokens).any():
        raise ShardCorrupt("tokens, mask and first row do not fit", where="record")


def _plain_rows(table: pa.Table, form: Format, tokens: np.ndarray) -> Decoded:
    """The row signals of profile `portable`, which are plain columns."""
    num_rows = _num_rows(table, tokens)
    found = {TOKENS: _ragged(table, TOKENS)}
    found |= {name: _ragged(table, name) for name in form.plan.row_signals}
    signals = {TOKENS: found[TOKENS].flat}
    for name in form.plan.row_signals:
        width, lists = form.codec.width(name), table.column(name).chunk(0).flatten()
        rows_differ = pa.types.is_list(lists.type) and len(lists) != num_rows.sum()
        if rows_differ or (found[name].sizes != num_rows * int(np.prod(width))).any():
            raise ShardCorrupt(f"{name} does not have a value for every row", where="record")
        signals[name] = found[name].flat.reshape(int(num_rows.sum()), *width)
    places = np.arange(len(tokens))
    return Decoded(places, num_rows, found[TOKENS].sizes, signals, None)


def _columns(part: Part, table: pa.Table, decoded: Decoded, form: Format) -> Columns:
    signals, plan = dict(decoded.signals), form.plan
    tokens = Ragged(signals.pop(TOKENS, np.empty(0, np.int32)), decoded.tokens)
    if missing := set(plan.row_signals) - set(signals):
        raise ShardCorrupt(f"lacks {sorted(missing)}", where="record")
    mask, first_rows = _ragged(table, "loss_mask"), table.column("first_row").to_numpy()
    limits = np.maximum(tokens.sizes, 1)
    if (mask.sizes != tokens.sizes).any() or ((first_rows < 0) | (first_rows >= limits)).any():
        raise ShardCorrupt("tokens, mask and first row do not fit", where="record")
    none = Ragged(np.empty(0, np.int32), np.zeros(len(table), np.int64))
    dense = bool(plan.dense_signals)
    return Columns(
        numbers=part.numbers.start + decoded.places,
        ids=table.column("example_id").to_pylist(),
        documents=table.column("document_id").to_pylist(),
        sources=table.column("source").to_pylist(),
        weights=table.column("weight").to_numpy(),
        first_rows=first_rows.astype(np.int64),
        tokens=tokens,
        mask=mask,
        positions=_ragged(table, "hidden_positions") if dense else none,
        dense_lengths=_ragged(table, "dense_lengths") if dense else none,
        images=_images(table),
        num_rows=_num_rows(table, tokens.sizes),
        rows={name: signals[name] for name in plan.row_signals},
        lists=decoded.lists,
        whole={name: _ragged(table, name) for name in plan.example_signals},
    )


def _ragged(table: pa.Table, name: str) -> Ragged:
    column = table.column(name).chunk(0)
    sizes, values = np.diff(column.offsets.to_numpy().astype(np.int64)), column.flatten()
    if pa.types.is_list(values.type):  # of a list for every row
        sizes, values = sizes * rows.row_width(values), values.flatten()
    return Ragged(values.to_numpy(zero_copy_only=False), sizes)


def _images(table: pa.Table) -> list[tuple[ImageSpan, ...]]:
    if "images" not in table.column_names:
        return []
    return [tuple(ImageSpan(**one) for one in own) for own in table.column("images").to_pylist()]
