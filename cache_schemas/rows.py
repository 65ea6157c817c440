"""One example as one Arrow record batch: the schema of a rows file and its messages.

One idea: an example is an encapsulated Arrow IPC message that is read by itself, with one range
request, and checked (xxh3-64) before it is parsed. The row signals travel as the bytes of a
`RowCodec`, or, in profile `portable`, as one plain column per signal: a list of numbers, or of one
list for every row (in the first caches one list of all rows, row-major).
This module maps dicts of values to messages; which codec, which file and which shard are others'.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from stillroom.cache_schemas import frames
from stillroom.cache_schemas.errors import ShardCorrupt
from stillroom.cache_schemas.manifest import Plan
from stillroom.cache_schemas.signals import EXAMPLE_SIGNALS, ROW_SIGNALS

PAYLOAD = "record"

IMAGE = pa.struct([("sha256", pa.string()), ("start", pa.int32()), ("length", pa.int32())])
EXAMPLE_COLUMNS: list[tuple[str, pa.DataType]] = [
    ("number", pa.int64()),
    ("example_id", pa.string()),
    ("document_id", pa.string()),
    ("source", pa.string()),
    ("weight", pa.float64()),
    ("first_row", pa.int32()),
    ("loss_mask", pa.list_(pa.bool_())),
]


def is_portable(plan: Plan) -> bool:
    """True when row signals are plain columns."""
    return plan.facts["capture"].get("profile") == "portable"


def schema(plan: Plan, nested: bool = False) -> pa.Schema:
    """The schema of every rows file of a plan; `nested` as in `RowCodec`."""
    columns = list(EXAMPLE_COLUMNS)
    if plan.facts["images"]:
        columns.append(("images", pa.list_(IMAGE)))
    if plan.dense_signals:
        columns.append(("hidden_positions", pa.list_(pa.int32())))
        columns.append(("dense_lengths", pa.list_(pa.int32())))
    if is_portable(plan):
        columns.append(("token_ids", pa.list_(pa.int32())))
        columns += [(name, _of_rows(name, nested)) for name in plan.row_signals]
    else:
        columns.append((PAYLOAD, pa.binary()))
    columns += [(name, pa.list_(_arrow_type(name))) for name in plan.example_signals]
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns])


def _of_rows(name: str, nested: bool) -> pa.DataType:
    row = pa.list_(_arrow_type(name)) if nested and ROW_SIGNALS[name].shape else _arrow_type(name)
    return pa.list_(row)


def _arrow_type(name: str) -> pa.DataType:
    return pa.from_numpy_dtype(np.dtype((ROW_SIGNALS | EXAMPLE_SIGNALS)[name].dtype))


def batch(schema: pa.Schema, values: Mapping[str, Any]) -> pa.RecordBatch:
    """A batch of one example; `values` has one entry per column."""
    arrays = [_column(field.type, values[field.name]) for field in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _column(kind: pa.DataType, value: Any) -> pa.Array:
    if not isinstance(value, np.ndarray):
        return pa.array([value], type=kind)
    if pa.types.is_list(kind.value_type):
        rows = _lists(value.reshape(-1), len(value), kind.value_type.value_type)
        return pa.ListArray.from_arrays(np.array([0, len(rows)], dtype=np.int32), rows)
    return _lists(value.reshape(-1), 1, kind.value_type)


def _lists(flat: np.ndarray, count: int, kind: pa.DataType) -> pa.ListArray:
    """Numbers as `count` lists of equal length."""
    values = pa.array(np.ascontiguousarray(flat), type=kind)
    width = len(values) // max(count, 1)
    offsets = np.arange(count + 1, dtype=np.int32) * np.int32(width)
    return pa.ListArray.from_arrays(offsets, values)


def row_width(lists: pa.ListArray) -> int:
    """Length of every list; 0 where there is none.

    Raises:
        ShardCorrupt: they differ.
    """
    widths = np.diff(lists.offsets.to_numpy())
    if (widths != widths[:1]).any():
        raise ShardCorrupt("holds rows of different lengths", where="record")
    return int(widths[0]) if widths.size else 0


def parse(message: bytes, schema: pa.Schema, where: str) -> dict[str, Any]:
    """The values of one message, lists as NumPy arrays.

    Raises:
        ShardCorrupt: the bytes are not one example of this schema.
    """
    if frames.is_compressed(message):
        raise ShardCorrupt("has compressed buffers", expected="plain ones", where=where)
    try:
        read = pa.ipc.read_record_batch(pa.py_buffer(message), schema)
        read.validate(full=True)
    except (pa.ArrowException, OSError, EOFError, ValueError) as error:
        raise ShardCorrupt(f"is not a record batch ({str(error)[:120]})", where=where) from None
    if read.num_rows != 1:
        raise ShardCorrupt(f"holds {read.num_rows} examples", expected="1", where=where)
    check_no_nulls(read.columns, where)
    return {name: _value(column) for name, column in zip(schema.names, read.columns)}


def parse_many(messages: bytes | memoryview, count: int, schema: pa.Schema, where: str) -> pa.Table:
    """The examples of consecutive messages, one row each, every column in one piece.

    Raises:
        ShardCorrupt: the bytes are not `count` messages of one example each.
    """
    stream = b"".join([schema.serialize().to_pybytes(), messages, END])
    try:
        batches = list(pa.ipc.open_stream(pa.py_buffer(stream)))
        table = pa.Table.from_batches(batches, schema=schema)
        table.validate(full=True)
    except (pa.ArrowException, OSError, EOFError, ValueError) as error:
        raise ShardCorrupt(f"is not a record batch ({str(error)[:120]})", where=where) from None
    if len(batches) != count or any(batch.num_rows != 1 for batch in batches):
        found = f"{table.num_rows} examples in {len(batches)} batches"
        raise ShardCorrupt(found, expected=f"{count}, each in one", where=where)
    table = table.combine_chunks()
    check_no_nulls([column.chunk(0) for column in table.columns], where)
    return table


END = b"\xff\xff\xff\xff\0\0\0\0"
"""Of a stream of messages."""


def check_no_nulls(columns: Iterable[pa.Array], where: str) -> None:
    """Refuse absent values, inside lists and structs too: nothing in a cache is absent."""
    for column in columns:
        if column.null_count:
            raise ShardCorrupt("holds an absent value", where=where)
        if pa.types.is_list(column.type):
            check_no_nulls([column.flatten()], where)
        elif pa.types.is_struct(column.type):
            check_no_nulls(column.flatten(), where)


def _value(column: pa.Array) -> Any:
    if pa.types.is_list(column.type) and not pa.types.is_struct(column.type.value_type):
        values = column.flatten()
        if pa.types.is_list(values.type):
            shape = len(values), row_width(values)
            return values.flatten().to_numpy(zero_copy_only=False).reshape(shape)
        return values.to_numpy(zero_copy_only=False)
    if pa.types.is_binary(column.type):
        return memoryview(column[0].as_buffer()).cast("B")
    return column[0].as_py()
