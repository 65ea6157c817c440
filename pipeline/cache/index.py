"""The Parquet index: one row per example, from the receipts, for people and plain tools.

One idea: what it says follows from the receipts, one row group per shard, so it can be made again
and held against them; and what reading it costs is known from its page headers before a page is
unpacked. It opens no shard.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.cache_schemas import parquet_pages
from stillroom.cache_schemas.errors import ShardCorrupt
from stillroom.cache_schemas.manifest import ShardReceipt
from stillroom.pipeline.cache.formats import Format

SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        ("shard", pa.int32()),
        ("example_id", pa.string()),
        ("source", pa.string()),
        ("num_tokens", pa.int32()),
        ("num_rows", pa.int32()),
        ("entropy", pa.float32()),
        ("tail", pa.float32()),
        ("offset", pa.int64()),
        ("bytes", pa.int64()),
        ("xxh3", pa.string()),
        ("preview", pa.string()),
    ]
)
PARQUET: dict[str, Any] = {
    "compression": "zstd",
    "write_page_checksum": True,
    "use_dictionary": ["source"],
}
TEXTS = [field.name for field in SCHEMA if field.type == pa.string()]
ROW_BYTES = {"example_id": 80, "source": 80, "xxh3": 24, "preview": 1024}
"""Of a text, on average over a row group; numbers take 16 at most."""
FREE_BYTES = 1 << 20
"""Besides, for every column and row group: a dictionary, a few long texts."""
FOOTER_BYTES = 1 << 14
"""Of a row group."""


def rows_of(form: Format, receipt: ShardReceipt) -> pa.Table:
    """What the index says of a shard."""
    columns = receipt.records.model_dump()
    columns["number"] = list(form.plan.shard_range(receipt.shard))
    columns["shard"] = [receipt.shard] * receipt.num_examples
    return pa.table({name: columns[name] for name in SCHEMA.names}, schema=SCHEMA)


def index_bytes(sizes: list[int]) -> int:
    """What the index of shards of these sizes may have, at most."""
    a_row = sum(ROW_BYTES.get(name, 16) for name in SCHEMA.names)
    return a_row * sum(sizes) + len(sizes) * (FOOTER_BYTES + FREE_BYTES)


class Index:
    """The index of a folder of shards, from its bytes.

    Args:
        data: the file's.
        sizes: examples of each shard.
        where: for messages.

    Raises:
        ShardCorrupt: it is no index of these shards, or asks for more memory than one may.
    """

    def __init__(self, data: bytes, sizes: list[int], where: str):
        self.where = where
        if data[-4:] != b"PAR1":
            raise ShardCorrupt("is not a Parquet file", where=where)
        if int.from_bytes(data[-8:-4], "little") > FREE_BYTES + FOOTER_BYTES * len(sizes):
            raise ShardCorrupt("its footer is too large", where=where)
        try:
            buffer = pa.py_buffer(data)
            self._file = pq.ParquetFile(pa.BufferReader(buffer), read_dictionary=TEXTS)
            described = self._file.schema_arrow
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            text = f"is not a Parquet file ({str(error)[:120]})"
            raise ShardCorrupt(text, where=where) from None
        texts = {name: pa.dictionary(pa.int32(), pa.string()) for name in TEXTS}
        expected = pa.schema([(f.name, texts.get(f.name, f.type)) for f in SCHEMA])
        names = [self._file.metadata.schema.column(at).path for at in range(len(described))]
        if not described.equals(expected) or names != SCHEMA.names:
            raise ShardCorrupt("has other columns than an index", where=where)
        self._check_sizes(memoryview(data), sizes)

    def read(self, columns: Iterable[str] | None = None) -> pa.Table:
        """All rows, or some columns of them."""
        names = SCHEMA.names if columns is None else list(columns)
        parts = [self.shard(at, names) for at in range(self._file.num_row_groups)]
        return pa.concat_tables(parts)

    def shard(self, at: int, columns: list[str] | None = None) -> pa.Table:
        """The rows of one of its shards."""
        try:
            read = self._file.read_row_group(at, columns=columns, use_threads=False)
            read.validate(full=True)
            return self._in_words(read)
        except (pa.ArrowException, OSError, ValueError, IndexError) as error:
            raise ShardCorrupt(f"does not unpack ({str(error)[:120]})", where=self.where) from None

    def _in_words(self, read: pa.Table) -> pa.Table:
        for place, name in enumerate(read.column_names):
            if name in ROW_BYTES:
                plain = self._plain(read.column(place), name)
                read = read.set_column(place, SCHEMA.field(name), plain)
        return read.replace_schema_metadata(None)

    def _plain(self, column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
        """A column of texts as such, unless its dictionary's are long and repeated too often."""
        total = sum(_text_bytes(chunk) for chunk in column.chunks)
        if total > FREE_BYTES + ROW_BYTES[name] * len(column):
            raise ShardCorrupt(f"{name} has {total:,} bytes of text", where=self.where)
        return column.cast(pa.string())

    def _check_sizes(self, data: memoryview, sizes: list[int]) -> None:
        groups = parquet_pages.row_groups(data, self.where)
        found = [group.rows for group in groups]
        if found != sizes:
            raise ShardCorrupt(f"{sum(found)} rows", expected=f"{sum(sizes)}", where=self.where)
        if {len(group.chunks) for group in groups} - {len(SCHEMA)}:
            raise ShardCorrupt("has other columns than an index", where=self.where)
        for group in groups:
            for (start, length), field in zip(group.chunks, SCHEMA):
                limit = FREE_BYTES + group.rows * ROW_BYTES.get(field.name, 16)
                _check_chunk(data, start, length, group.rows, limit, self.where)


def _text_bytes(column: pa.DictionaryArray) -> int:
    """What a column has, written out."""
    offsets = column.dictionary.buffers()[1]
    if not len(column) or offsets is None:
        return 0
    lengths = np.diff(np.frombuffer(offsets, dtype=np.int32)[: len(column.dictionary) + 1])
    return int(lengths[column.indices.to_numpy()].sum(dtype=np.int64))


def _check_chunk(
    data: memoryview, start: int, length: int, rows: int, limit: int, where: str
) -> None:
    sizes = list(parquet_pages.pages(data, start, length, where))
    unpacked, values = sum(size for size, _ in sizes), sum(count for _, count in sizes)
    if unpacked > limit or values != rows:
        found = f"a column of {values:,} values and {unpacked:,} bytes"
        raise ShardCorrupt(found, expected=f"{rows:,} and at most {limit:,}", where=where)
