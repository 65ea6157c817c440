"""The files of one shard: built in a folder, and inspected wherever they lie.

One idea: `inspect` reads a shard's files, decodes every record and returns the receipt they
deserve, so a receipt is a function of the bytes in place; writing, resuming, adopting another
worker's files and verifying all compare against it. It publishes nothing.
"""

import hashlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from stillroom.cache_schemas import layout, rows
from stillroom.cache_schemas.errors import CacheError, ShardCorrupt
from stillroom.cache_schemas.manifest import FileEntry, Records, ShardReceipt
from stillroom.pipeline.cache.formats import Encoded, Format
from stillroom.pipeline.cache.storage.directory import Storage
from stillroom.pipeline.plain_text import plain
from stillroom.pipeline.record import Example, TeacherRecord

PREVIEW_CHARACTERS = 160
Preview = Callable[[Example], str]
"""The beginning of an example's text, for people."""


def build(folder: Path, form: Format, shard: int, examples: Iterable[Encoded]) -> None:
    """Write the files of a shard below `folder`, under their names in the cache.

    Raises:
        CacheError: there are not exactly the plan's examples.
    """
    numbers = form.plan.shard_range(shard)
    chunks: dict[str, list[bytes]] = {name: [] for name in form.dense}
    path = folder / layout.rows(shard)
    path.parent.mkdir(parents=True)
    written = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, form.schema) as writer:
        for written, example in enumerate(examples, start=1):
            if written > len(numbers):  # one too many is enough to know
                break
            values = {**example.values, "number": numbers[written - 1]}
            writer.write_batch(rows.batch(form.schema, values))  # one message, one example
            for name, chunk in example.chunks.items():
                chunks[name].append(chunk)
    if written != len(numbers):
        raise CacheError(f"shard {shard} was given {written} records", expected=f"{len(numbers)}")
    for name, encoded in chunks.items():
        target = folder / layout.dense_shard(name, shard)
        target.parent.mkdir(parents=True)
        target.write_bytes(form.dense[name].pack(encoded))


def inspect(
    storage: Storage,
    form: Format,
    shard: int,
    preview: Preview | None = None,
    examine: Callable[[TeacherRecord], None] = lambda record: None,
) -> ShardReceipt:
    """The receipt of the files in place; every record is decoded, and examined, on the way.

    Raises:
        FileNotFoundError: a file is missing.
        ShardCorrupt: a file is not what the plan says.
    """
    files: dict[str, FileEntry] = {}
    data = _read(storage, layout.rows(shard), files)
    dense = {name: _DenseShard(storage, form, name, shard, files) for name in form.dense}
    where = f"{storage.location}/{layout.rows(shard)}"
    messages, numbers = _messages(data, form, where), form.plan.shard_range(shard)
    if len(messages) != len(numbers):
        raise ShardCorrupt(f"{len(messages)} examples", expected=f"{len(numbers)}", where=where)
    entries = []
    for position, (start, stop) in enumerate(messages):
        number, message = numbers[position], data[start:stop]
        fetch = partial(_fetch, dense, position)
        record = decode(form, message, number, f"{where} example {number}", fetch)
        examine(record)
        place = {"offset": start, "bytes": stop - start, "xxh3": xxhash.xxh3_64_hexdigest(message)}
        entries.append(place | summary(record, preview))
    columns = {name: [entry[name] for entry in entries] for name in Records.model_fields}
    return ShardReceipt(
        plan=form.plan.digest,
        codec=form.codec_digest,
        shard=shard,
        files=files,
        records=Records(**columns),
    )


def decode(
    form: Format,
    message: bytes,
    number: int,
    where: str,
    dense: Callable[[str, int], np.ndarray],
    signals: Collection[str] | None = None,
) -> TeacherRecord:
    """A record of its Arrow message; `dense(name, positions used)` supplies its dense arrays.

    Raises:
        ShardCorrupt: it is not the record of example `number`.
    """
    values = parse(form, message, number, where)
    lengths = form.dense_lengths(values)
    wanted = [name for name in form.dense if signals is None or name in signals]
    arrays = {name: dense(name, lengths[name]) for name in wanted}
    return form.record(values, arrays, signals)


def dense_values(storage: Storage, form: Format, shard: int, name: str) -> Iterator[np.ndarray]:
    """One dense signal of every example of a shard, [positions used, width]; no other is decoded.

    Raises:
        FileNotFoundError: a file is missing.
        ShardCorrupt: a file is not what the plan says.
    """
    data, where = storage.read(layout.rows(shard)), f"{storage.location}/{layout.rows(shard)}"
    dense = {name: _DenseShard(storage, form, name, shard, {})}
    numbers = form.plan.shard_range(shard)
    for position, (start, stop) in enumerate(_messages(data, form, where)):
        values = parse(form, data[start:stop], numbers[position], where)
        yield _fetch(dense, position, name, form.dense_lengths(values)[name])


def parse(form: Format, message: bytes, number: int, where: str) -> dict[str, Any]:
    """The columns of the message of example `number`."""
    values = rows.parse(message, form.schema, where)
    if values["number"] != number:
        raise ShardCorrupt(f"holds example {values['number']}", expected=f"{number}", where=where)
    return values


def summary(record: TeacherRecord, preview: Preview | None) -> dict[str, Any]:
    """What the index tells about a record."""
    signals = record.signals
    entropy, tail = signals.get("entropy"), signals.get("tail_logprob")
    return {
        "example_id": record.example.example_id,
        "source": record.example.source,
        "num_tokens": len(record.example.token_ids),
        "num_rows": record.num_rows,
        "entropy": _mean(entropy) if entropy is not None else None,
        "tail": _mean(np.exp(tail.astype(np.float64))) if tail is not None else None,
        "preview": plain(preview(record.example), PREVIEW_CHARACTERS) if preview else "",
    }


def _mean(array: np.ndarray) -> float | None:
    mean = float(np.mean(array, dtype=np.float64)) if array.size else 0.0
    return round(mean, 6) if np.isfinite(mean) else None  # JSON has no NaN


def _read(storage: Storage, name: str, files: dict[str, FileEntry]) -> bytes:
    data = storage.read(name)
    files[name] = file_entry(data)
    return data


def file_entry(data: bytes) -> FileEntry:
    """Size and sha256 of bytes."""
    return FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _messages(data: bytes, form: Format, where: str) -> list[tuple[int, int]]:
    """Start and end of every record batch message of an Arrow IPC file."""
    try:
        with pa.ipc.open_file(pa.py_buffer(data)) as file:
            num_batches, schema = file.num_record_batches, file.schema
        source = pa.BufferReader(data)
        source.seek(rows.FIRST_MESSAGE)
        pa.ipc.read_message(source)  # the schema
        bounds = [source.tell()]
        for _ in range(num_batches):
            pa.ipc.read_message(source)
            bounds.append(source.tell())
    except (pa.ArrowException, OSError, EOFError, ValueError) as error:
        raise ShardCorrupt(f"is not an Arrow file ({str(error)[:120]})", where=where) from None
    if not schema.equals(form.schema):
        raise ShardCorrupt("has another schema than the plan's", where=where)
    return list(itertools.pairwise(bounds))


class _DenseShard:
    """One Zarr shard held in memory."""

    def __init__(
        self, storage: Storage, form: Format, name: str, shard: int, files: dict[str, FileEntry]
    ):
        path = layout.dense_shard(name, shard)
        self.array, self.where = form.dense[name], f"{storage.location}/{path}"
        self.data = _read(storage, path, files)
        tail = self.data[-self.array.index_bytes :]  # where Zarr puts the index
        count = len(form.plan.shard_range(shard))
        self.entries = self.array.parse_index(tail, len(self.data), count, self.where)


def _fetch(dense: dict[str, _DenseShard], position: int, name: str, used: int) -> np.ndarray:
    held = dense[name]
    offset, length = (int(value) for value in held.entries[position])
    return held.array.decode(held.data[offset : offset + length], used, held.where)
