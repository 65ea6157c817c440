"""The files of one shard: built in a folder, and inspected wherever they lie.

One idea: `inspect` reads a shard's files, decodes every record and returns the receipt they
deserve, so a receipt is a function of the bytes in place; writing, resuming, adopting another
worker's files and verifying all compare against it. It publishes nothing.
"""

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from stillroom.cache_schemas import layout, rows
from stillroom.cache_schemas.dense_array import DenseArray
from stillroom.cache_schemas.errors import CacheError, ShardCorrupt, StillroomError
from stillroom.cache_schemas.manifest import FileEntry, Records, ShardReceipt
from stillroom.pipeline.cache.columns import Columns, Part, columns_of, parts
from stillroom.pipeline.cache.formats import Encoded, Format
from stillroom.pipeline.cache.pieces import Pieces
from stillroom.pipeline.cache.storage.protocol import Storage
from stillroom.pipeline.plain_text import plain
from stillroom.pipeline.record import Example, TeacherRecord

PREVIEW_CHARACTERS = 160
Preview = Callable[[Example], str]
"""The beginning of an example's text, for people."""
Examine = Callable[[Columns], None]
"""Raises a ShardCorrupt whose `where` names an example, if it does not like what it sees."""


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
    examine: Examine = lambda columns: None,
) -> ShardReceipt:
    """The receipt of the files in place; every record is decoded, and examined, on the way.

    Raises:
        FileNotFoundError: a file is missing.
        ShardCorrupt: a file is not what the plan says; names the example where one is to blame.
    """
    numbers = form.plan.shard_range(shard)
    file = Pieces(storage, layout.rows(shard))
    entries: list[dict[str, Any]] = []
    lengths: list[dict[str, int]] = []
    for part in parts(file, form, numbers):
        entries += _entries(part, form, preview, examine, file.where)
        lengths += _dense_lengths(part, form)
    files, chunks = {file.name: file.entry()}, {}
    for name in form.dense:
        dense = Pieces(storage, layout.dense_shard(name, shard))
        chunks[name] = _inspect_dense(dense, form, name, [used[name] for used in lengths])
        files[dense.name] = dense.entry()
    names = Records.model_fields.keys() - {"chunks"}
    columns = {name: [entry[name] for entry in entries] for name in names}
    return ShardReceipt(
        plan=form.plan.digest,
        codec=form.codec_digest,
        shard=shard,
        files=files,
        records=Records(chunks=chunks, **columns),
    )


def _entries(
    part: Part, form: Format, preview: Preview | None, examine: Examine, where: str
) -> list[dict[str, Any]]:
    """What the receipt says of each example of a part."""
    try:
        found = _examined(part, form, preview, examine)
    except StillroomError as error:
        _blame(part, form, examine, where)
        raise type(error)(error.found, expected=error.expected, where=where) from None
    for at, (start, stop) in enumerate(part.bounds.tolist()):
        checksum = xxhash.xxh3_64_hexdigest(part.message(at))
        found[at] |= {"offset": start, "bytes": stop - start, "xxh3": checksum}
    return found


def _examined(
    part: Part, form: Format, preview: Preview | None, examine: Examine
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{}] * len(part.numbers)
    for places, columns in columns_of(part, form):
        examine(columns)
        for place, entry in zip(places.tolist(), summaries(columns, preview), strict=True):
            found[place] = entry
    return found


def _blame(part: Part, form: Format, examine: Examine, where: str) -> None:
    """Examine example by example, to name the one that is wrong."""
    for at, number in enumerate(part.numbers):
        try:
            _examined(part.alone(at), form, None, examine)
        except StillroomError as error:
            named = {"expected": error.expected, "remedy": error.remedy}
            raise type(error)(error.found, where=f"{where} example {number}", **named) from None


def _dense_lengths(part: Part, form: Format) -> list[dict[str, int]]:
    if not form.all_dense:
        return [{}] * len(part.numbers)
    return [
        form.dense_lengths({"dense_lengths": own, "example_id": f"example {number}"})
        for number, own in zip(part.numbers, part.table.column("dense_lengths").to_pylist())
    ]


def _inspect_dense(file: Pieces, form: Format, name: str, lengths: list[int]) -> list[str]:
    """The checksum of every chunk of a dense signal's shard, each decoded on the way."""
    array, found = form.dense[name], []
    for number, chunk in enumerate(_chunks(file, array, len(lengths))):
        values = array.decode(chunk, lengths[number], file.where)
        if not np.isfinite(values).all():
            text = f"example {number} of the shard has a value that is not finite"
            raise ShardCorrupt(text, where=file.where)
        found.append(xxhash.xxh3_64_hexdigest(chunk))
    return found


def _chunks(file: Pieces, array: DenseArray, count: int) -> Iterator[bytes]:
    start = max(file.size - array.index_bytes, 0)  # at the end, where Zarr puts it
    index = bytes(file.range(start, file.size))
    for offset, length in array.parse_index(index, file.size, count, file.where).tolist():
        yield bytes(file.range(offset, offset + length))


def summaries(columns: Columns, preview: Preview | None) -> Iterator[dict[str, Any]]:
    """What the index tells about each of some examples."""
    sizes, ends = columns.num_rows, np.cumsum(columns.num_rows)
    entropy, tail = columns.rows.get("entropy"), columns.rows.get("tail_logprob")
    shares = None if tail is None else np.exp(tail.astype(np.float64))
    entropies, tails = _means(entropy, ends, sizes), _means(shares, ends, sizes)
    lines = zip(columns.ids, columns.sources, columns.tokens.sizes.tolist(), sizes.tolist())
    for at, (name, source, tokens, rows_) in enumerate(lines):
        yield {
            "example_id": name,
            "source": source,
            "num_tokens": tokens,
            "num_rows": rows_,
            "entropy": entropies[at],
            "tail": tails[at],
            "preview": plain(preview(columns.example(at)), PREVIEW_CHARACTERS) if preview else "",
        }


def _means(values: np.ndarray | None, ends: np.ndarray, sizes: np.ndarray) -> list[float | None]:
    """The mean of each example's rows, to six decimals; None where there are no values."""
    if values is None:
        return [None] * len(sizes)
    sums, held = np.zeros(len(sizes)), sizes > 0
    if held.any():
        sums[held] = np.add.reduceat(values.astype(np.float64), (ends - sizes)[held])
    means = (sums / np.maximum(sizes, 1)).tolist()
    return [round(mean, 6) if math.isfinite(mean) else None for mean in means]  # JSON has no NaN


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
    numbers, array = form.plan.shard_range(shard), form.dense[name]
    file, dense = (
        Pieces(storage, n) for n in (layout.rows(shard), layout.dense_shard(name, shard))
    )
    lengths = [own for part in parts(file, form, numbers) for own in _dense_lengths(part, form)]
    for used, chunk in zip(lengths, _chunks(dense, array, len(numbers)), strict=True):
        yield array.decode(chunk, used[name], dense.where)


def parse(form: Format, message: bytes, number: int, where: str) -> dict[str, Any]:
    """The columns of the message of example `number`."""
    values = rows.parse(message, form.schema, where)
    if values["number"] != number:
        raise ShardCorrupt(f"holds example {values['number']}", expected=f"{number}", where=where)
    return values


def file_entry(data: bytes) -> FileEntry:
    """Size and sha256 of bytes."""
    return FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
