"""Damage by a publisher who means it: whatever is changed, every checksum above it is redone.

One idea: a cache is opened as plain values (records, receipts, manifest), one of them is changed,
and all of it is written again with receipts, index and manifest that fit. So no hash can tell;
only meaning can.
"""

import hashlib
import io
import itertools
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from stillroom.cache_schemas import canonical, layout, rows
from stillroom.cache_schemas.manifest import Manifest, ShardReceipt, read
from stillroom.cache_schemas.record_codec import TOKENS
from stillroom.pipeline.cache import index
from stillroom.pipeline.cache.formats import Format
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.cache.shard import file_entry

Values = dict[str, Any]
Change = Callable[[Values, random.Random], None]


def form_of(root: Path) -> Format:
    """The format of a sealed cache."""
    return TeacherCache.open(root).form


def rewrite_record(root: Path, number: int, change: Change, choice: random.Random) -> None:
    """Change the values of one example, row signals decoded, and redo every checksum."""
    form = form_of(root)
    shard, position = divmod(number, form.plan.examples_per_shard)
    path = root / layout.rows(shard)
    with pa.ipc.open_file(pa.py_buffer(path.read_bytes())) as file:
        batches = [file.get_batch(at) for at in range(file.num_record_batches)]
    messages = [batch.serialize().to_pybytes() for batch in batches]
    values = rows.parse(messages[position], form.schema, "test")
    values |= {name: np.array(array) for name, array in _said(form, values).items()}
    change(values, choice)
    said = {name: values[name] for name in (TOKENS, *form.plan.row_signals)}
    if not form.portable:
        values[rows.PAYLOAD] = form.codec.encode(said)
    batches[position] = rows.batch(form.schema, values)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, form.schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    path.write_bytes(sink.getvalue().to_pybytes())
    redo(root, shard)


def _said(form: Format, values: Values) -> dict[str, np.ndarray]:
    record = form.record(values, {})
    said = {name: record.signals[name] for name in form.plan.row_signals}
    return said | {TOKENS: record.example.token_ids}


def redo(root: Path, shard: int, **claimed: Any) -> None:
    """Make receipt, index and manifest fit the files of a shard; `claimed` columns of its records
    are said instead of what is there."""
    form = form_of(root)
    where = root / layout.receipt(shard)
    body = canonical.check(where.read_bytes(), "receipt")
    data = (root / layout.rows(shard)).read_bytes()
    bounds = _bounds(data, len(body["records"]["offset"]))
    messages = [data[start:stop] for start, stop in bounds]
    body["records"] |= {
        "offset": [start for start, _ in bounds],
        "bytes": [stop - start for start, stop in bounds],
        "xxh3": [xxhash.xxh3_64_hexdigest(message) for message in messages],
    }
    for name in form.dense:
        chunks = chunks_of(root, form, name, shard)
        body["records"]["chunks"][name] = [xxhash.xxh3_64_hexdigest(chunk) for chunk in chunks]
    body["records"] |= claimed
    for name in body["files"]:
        entry = file_entry((root / name).read_bytes())
        body["files"][name] = {"bytes": entry.bytes, "sha256": entry.sha256}
    where.write_bytes(canonical.sign(body))
    rewrite_index(root, form)


def _bounds(data: bytes, count: int) -> list[tuple[int, int]]:
    source = pa.BufferReader(data)
    source.seek(8)
    pa.ipc.read_message(source)
    ends = [source.tell()]
    for _ in range(count):
        pa.ipc.read_message(source)
        ends.append(source.tell())
    return list(itertools.pairwise(ends))


def chunks_of(root: Path, form: Format, name: str, shard: int) -> list[bytes]:
    """The chunks of a dense signal's shard, in the order of its index."""
    data = (root / layout.dense_shard(name, shard)).read_bytes()
    tail = data[-form.dense[name].index_bytes : -4]
    count = len(form.plan.shard_range(shard))
    places = np.frombuffer(tail, "<u8").reshape(-1, 2)[:count].tolist()
    return [data[start : start + size] for start, size in places]


def swap_chunks(root: Path, shard: int) -> None:
    """Swap two entries of a dense index and redo its checksum, and no other."""
    form = form_of(root)
    name = next(iter(form.dense))
    path = root / layout.dense_shard(name, shard)
    data = path.read_bytes()
    at = len(data) - form.dense[name].index_bytes
    first, second, rest = data[at : at + 16], data[at + 16 : at + 32], data[at + 32 : -4]
    swapped = second + first + rest
    path.write_bytes(data[:at] + swapped + struct.pack("<I", google_crc32c.value(swapped)))


def rewrite_index(root: Path, form: Format, change: Callable | None = None) -> None:
    """Write the index (of one folder) again from the receipts, and sign the manifest anew."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, index.SCHEMA, **index.PARQUET) as file:
        for shard in range(form.plan.num_shards):
            data = (root / layout.receipt(shard)).read_bytes()
            table = index.rows_of(form, read(ShardReceipt, data, "receipt"))
            file.write_table(table if change is None else change(table))
    (root / layout.index(0)).write_bytes(sink.getvalue())
    sign_manifest(root, form)


def sign_manifest(root: Path, form: Format, **changed: Any) -> None:
    """A manifest that fits whatever files there are."""
    body = canonical.check((root / layout.MANIFEST).read_bytes(), "manifest")
    for name in body["files"]:
        entry = file_entry((root / name).read_bytes())
        body["files"][name] = {"bytes": entry.bytes, "sha256": entry.sha256}
    for shard in range(form.plan.num_shards):
        data = (root / layout.receipt(shard)).read_bytes()
        said = json.loads(data)
        table = body["shards"]
        table["receipt"][shard] = hashlib.sha256(data).hexdigest()
        table["num_tokens"][shard] = sum(said["records"]["num_tokens"])
        table["num_rows"][shard] = sum(said["records"]["num_rows"])
        table["bytes"][shard] = sum(entry["bytes"] for entry in said["files"].values())
    (root / layout.MANIFEST).write_bytes(canonical.sign(body | changed))
    read(Manifest, (root / layout.MANIFEST).read_bytes(), "manifest")


def _set(name: str, value: Any) -> Change:
    def change(values: Values, choice: random.Random) -> None:
        array = values[name]
        array[choice.randrange(len(array))] = value

    return change


def _swap_rows(values: Values, choice: random.Random) -> None:
    """Two rows of top-k ids change places: each names what the other said."""
    values["topk_ids"][:, [0, -1]] = values["topk_ids"][:, [0, 0]]


def _another_text(values: Values, choice: random.Random) -> None:
    at = choice.randrange(len(values[TOKENS]))
    values[TOKENS][at] = (values[TOKENS][at] + 1) % 997


def _flip_mask(values: Values, choice: random.Random) -> None:
    mask = np.array(values["loss_mask"])
    mask[choice.randrange(len(mask))] ^= True
    values["loss_mask"] = mask


def _falling_positions(values: Values, choice: random.Random) -> None:
    values["hidden_positions"] = np.array(values["hidden_positions"])[::-1].copy() - (
        len(values["hidden_positions"]) == 1
    ) * np.int32(1000)


def _give(name: str, value: Any) -> Change:
    return lambda values, choice: values.update({name: value})


CHANGES: dict[str, tuple[Change, str]] = {
    "weight NaN": (_give("weight", float("nan")), "weight"),
    "weight infinite": (_give("weight", float("inf")), "weight"),
    "weight negative": (_give("weight", -1.0), "weight"),
    "example_id of another": (_give("example_id", "0" * 32), "not the hash of its content"),
    "another token": (_another_text, "not the hash of its content"),
    "mask flipped": (_flip_mask, "not the hash of its content"),
    "positions fall": (_falling_positions, "position"),
    "rank 0": (_set("token_rank", 0), "token_rank"),
    "rank beyond": (_set("token_rank", 5000), "token_rank"),
    "entropy infinite": (_set("entropy", np.inf), "entropy"),
    "entropy NaN": (_set("entropy", np.nan), "entropy"),
    "entropy below 0": (_set("entropy", -3.0), "entropy"),
    "lse infinite": (_set("lse", np.inf), "lse"),
    "log-probability above 0": (_set("token_logprob", 0.5), "token_logprob"),
    "ids repeated": (_swap_rows, "repeated"),
}
"""Name -> change of one example, and what verification must say of it."""


def _of_record(change: Change) -> Callable[[Path, int, random.Random], None]:
    return lambda root, number, choice: rewrite_record(root, number, change, choice)


def _swap(root: Path, number: int, choice: random.Random) -> None:
    swap_chunks(root, number // form_of(root).plan.examples_per_shard)


def _claim(name: str, value: Any) -> Callable[[Path, int, random.Random], None]:
    def claim(root: Path, number: int, choice: random.Random) -> None:
        form = form_of(root)
        shard = number // form.plan.examples_per_shard
        redo(root, shard, **{name: [value] * len(form.plan.shard_range(shard))})

    return claim


def _shuffled_index(root: Path, number: int, choice: random.Random) -> None:
    rewrite_index(root, form_of(root), lambda table: table.take(list(range(len(table)))[::-1]))


def _nudge(values: Values, choice: random.Random) -> None:
    """Another value that could be the teacher's."""
    array = values[choice.choice(["entropy", "lse"])]
    array.reshape(-1)[choice.randrange(array.size)] += np.float32(0.25)


NONSENSE: dict[str, Callable[[Path, int, random.Random], None]] = {
    **{name: _of_record(change) for name, (change, _) in CHANGES.items()},
    "chunks swapped": _swap,
    "tokens claimed": _claim("num_tokens", 1 << 20),
    "entropy claimed": _claim("entropy", 0.125),
    "index shuffled": _shuffled_index,
}
"""Damages that verification must find (or that a codec cannot even write)."""
DAMAGES = NONSENSE | {"another entropy": _of_record(_nudge)}
