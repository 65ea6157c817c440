"""Rows of Parquet and Arrow files, and of folders that `datasets` saved.

One idea: rows are read a few megabytes at a time, whatever a row weighs, and only the columns that
are needed. A page that cannot be decoded costs its rows and is told by their numbers.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stillroom.cache_schemas.errors import CorpusError, first_line
from stillroom.pipeline.corpus.documents import Rejected, Row

BYTES_PER_READ = 8 << 20
MOST_ROWS = 256
"""A column of few different values is small on disk and large in memory."""


def read_parquet(path: Path, columns: list[str] | None = None) -> Iterator[Row | Rejected]:
    """Rows of a Parquet file; `columns` are read, or all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Without read-ahead a row group of pictures is never in memory as a whole.
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    except (pa.ArrowException, OSError) as error:
        found = f"is not Parquet ({_reason(error)})"
        yield Rejected(CorpusError(found, where=str(path), remedy="Get the file again."))
        return
    with file:
        names = _present(columns, file.schema_arrow.names)
        first = 1
        for group in range(file.metadata.num_row_groups):
            yield from _group(file, group, names, path, first)
            first += file.metadata.row_group(group).num_rows


def _group(file: Any, group: int, names: list[str], path: Path, first: int) -> Iterator[Any]:
    """The rows of one row group, the first of which has number `first`."""
    facts = file.metadata.row_group(group)
    done = 0
    try:
        size = _rows_per_read(facts, names)
        for batch in file.iter_batches(size, row_groups=[group], columns=names):
            yield from _rows(batch, path, first + done)
            done += batch.num_rows
    except Exception as error:  # Arrow raises many kinds over damaged pages
        lost = f"{path} rows {first + done} to {first + facts.num_rows - 1}"
        found = f"a page cannot be read ({_reason(error)})"
        yield Rejected(CorpusError(found, where=lost, remedy="Get the file again."))


def _rows_per_read(facts: Any, names: list[str]) -> int:
    chunks = (facts.column(i) for i in range(facts.num_columns))
    wanted = [c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in names]
    return _few(sum(wanted), facts.num_rows)


def _few(size: int, rows: int) -> int:
    return max(1, min(MOST_ROWS, BYTES_PER_READ * rows // max(size, 1)))


def read_arrow(path: Path, columns: list[str] | None = None) -> Iterator[Row | Rejected]:
    """Rows of an Arrow file, of either kind (file, or the stream that `datasets` writes)."""
    first = 1
    try:
        for batch in _batches(path):
            names = _present(columns, batch.schema.names)
            chosen = batch.select(names)
            size = _few(chosen.nbytes, chosen.num_rows)
            for begin in range(0, chosen.num_rows, size):
                yield from _rows(chosen.slice(begin, size), path, first + begin)
            first += batch.num_rows
    except Exception as error:  # as for Parquet
        found = f"is not Arrow, or damaged ({_reason(error)})"
        where = f"{path} from row {first} on"
        yield Rejected(CorpusError(found, where=where, remedy="Get the file again."))


def _batches(path: Path) -> Iterator[Any]:
    import pyarrow as pa

    source = pa.memory_map(str(path))
    try:
        reader = pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        yield from pa.ipc.open_stream(source)
        return
    for number in range(reader.num_record_batches):
        yield reader.get_batch(number)


def _rows(batch: Any, path: Path, first: int) -> Iterator[Row | Rejected]:
    """A batch as rows; texts that are not UTF-8 cost their own row only."""
    try:
        values = batch.to_pylist(maps_as_pydicts="lossy")
    except UnicodeDecodeError:
        if batch.num_rows > 1:
            for number in range(batch.num_rows):
                yield from _rows(batch.slice(number, 1), path, first + number)
        else:
            where = f"{path} row {first}"
            yield Rejected(CorpusError("holds text that is not UTF-8", where=where))
        return
    for number, row in enumerate(values, start=first):
        yield Row(f"{path} row {number}", row, path.parent, arrow=True)


def _present(columns: list[str] | None, known: list[str]) -> list[str]:
    """The wanted columns that are there; a missing one is missed where a row is made a document."""
    return known if columns is None else [name for name in columns if name in known] or known[:1]


def _reason(error: BaseException) -> str:
    return first_line(error)
