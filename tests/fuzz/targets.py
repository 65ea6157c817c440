"""What a stranger's bytes reach: every decoder of a cache, each as one function of bytes.

One idea: a decoder may refuse (StillroomError) or succeed; anything else is a finding. Digests and
checksums are made right first, because a stranger can make them right too.
"""

import io
import struct
from collections.abc import Callable

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from stillroom.cache_schemas import canonical, layout, rows
from stillroom.cache_schemas.dense_array import DenseArray, check_group, group_metadata
from stillroom.cache_schemas.errors import StillroomError
from stillroom.cache_schemas.manifest import Manifest, Plan, ShardReceipt, read
from stillroom.cache_schemas.record_codec import RowCodec
from stillroom.pipeline.cache.care.meaning import check
from stillroom.pipeline.cache.columns import columns_of, parts
from stillroom.pipeline.cache.formats import (
    Format,
    codec_sizes,
    parse_table,
    read_codec,
    table_bytes,
)
from stillroom.pipeline.cache.index import PARQUET, SCHEMA, Index
from stillroom.pipeline.cache.pieces import Pieces
from stillroom.pipeline.cache.sealing import check_receipt
from tests.fuzz.web_answers import SEEDS, http
from tests.synthetic_records import make_plan, make_record, records_of


class Memory:
    """A storage of a few files, enough to open a codec."""

    location = "memory"

    def __init__(self, files: dict[str, bytes]):
        self.files = files

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """A whole file."""
        if name not in self.files:
            raise FileNotFoundError(name)
        return self.files[name]


class Whole(Memory):
    """A storage of one file."""

    def __init__(self, data: bytes):
        super().__init__({"file": data})

    def size(self, name: str) -> int:
        """Bytes of it."""
        return len(self.files[name])

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Some of them."""
        return self.files[name][start:][:length]


PLANS = {
    name: make_plan(3, 2, 8, profile=name, hidden_layers=[2], images=True, tail_draws=2)
    for name in ("exact", "portable", "small", "strict")
}
CODECS = {
    name: RowCodec.fit(
        name,  # type: ignore[arg-type]
        [{n: r.signals[n] for n in plan.row_signals} for r in records_of(plan, 0)],
        **codec_sizes(plan),
    )
    for name, plan in PLANS.items()
}
FLAT = RowCodec("portable", nested=False, **codec_sizes(PLANS["portable"]))
FORMS = {name: Format(PLANS[name], CODECS[name]) for name in PLANS}
FORMS["without nesting"] = Format(PLANS["portable"], FLAT)
RECORDS = sorted(name for name, form in FORMS.items() if not form.portable)
DENSE = {
    name: DenseArray(3, 2, 8, 12, {"name": name, "step": 0.05})
    for name in ("bf16", "fp16", "int8", "fp8", "step")
}


def _tables() -> Memory:
    files = {}
    for made in CODECS.values():
        for name, sha in made.facts()["tables"].items():
            files[layout.table(sha)] = table_bytes(made.tables[name])
    return Memory(files)


TABLES = _tables()
SOUND = {
    name: bytes(FORMS[name].encode(make_record(FORMS[name].plan, 1)).values["record"])
    for name in RECORDS
}
"""A sound record of every codec."""


def manifest(data: bytes) -> None:
    """manifest.json, and the plan in it."""
    body = read(Manifest, _signed(data), "manifest")
    plan = Plan.from_facts(body.plan, "manifest")
    read_codec(TABLES, body.codec, plan)  # type: ignore[arg-type]


def plan(data: bytes) -> None:
    """plan.json, and what is computed from it."""
    found = Plan.from_bytes(_signed(data))
    found.differences(PLANS["exact"])
    Format(found, CODECS["exact"])


def receipt(data: bytes) -> None:
    """A receipt."""
    check_receipt(read(ShardReceipt, _signed(data), "receipt"), FORMS["exact"], 0, "receipt")


def codec(data: bytes) -> None:
    """codec.json."""
    body = canonical.check(_signed(data), "codec")
    rows_facts = body.get("rows")
    profile = rows_facts.get("profile") if isinstance(rows_facts, dict) else None
    expected = PLANS.get(profile, PLANS["small"]) if isinstance(profile, str) else PLANS["small"]
    read_codec(TABLES, body, expected)  # type: ignore[arg-type]


def table(data: bytes) -> None:
    """A table; refused by ValueError, which `read_codec` turns into a ShardCorrupt."""
    try:
        parse_table(data)
    except (ValueError, TypeError) as error:
        raise StillroomError(str(error)) from None


def message(data: bytes) -> None:
    """An Arrow message and the record in it; the first byte chooses the profile."""
    form = FORMS[sorted(FORMS)[data[0] % len(FORMS)]] if data else FORMS["exact"]
    values = rows.parse(data[1:], form.schema, "message")
    form.dense_lengths(values)
    form.record(values, {})


def file(data: bytes) -> None:
    """A rows file of three examples, walked and decoded as verification does; the first byte
    chooses the profile."""
    name = sorted(FORMS)[data[0] % len(FORMS)] if data else "exact"
    form, numbers = FORMS[name], range(3)
    for part in parts(Pieces(Whole(data[1:]), "file"), form, numbers):  # type: ignore[arg-type]
        for _, columns in columns_of(part, form):
            check(columns, form.plan)


def records(data: bytes) -> None:
    """Two records decoded together, the first one damaged: refused like that one alone."""
    name = RECORDS[data[0] % 3] if data else "exact"
    body = data[1:-8]
    blob = body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little")
    together = _outcome(lambda: list(CODECS[name].decode_many([blob, SOUND[name]])))
    assert together == _outcome(lambda: CODECS[name].decode(blob)), "alone and together differ"
    if not together:
        raise StillroomError("refused")


def _outcome(work: Callable[[], object]) -> bool:
    try:
        work()
    except StillroomError:
        return False
    return True


def parquet(data: bytes) -> None:
    """An index of three rows."""
    Index(data, [3], "index").read()


def zarr(data: bytes) -> None:
    """A zarr.json."""
    DENSE["bf16"].check_metadata(data, "zarr.json")


def group(data: bytes) -> None:
    """The zarr.json of a group."""
    check_group(data, {"hidden.2": DENSE["bf16"], "hidden.3": DENSE["step"]}, "zarr.json")


def record(data: bytes) -> None:
    """The bytes of row signals, their checksum made right; the first byte chooses the profile."""
    name = RECORDS[data[0] % 3] if data else "exact"
    body = data[1:-8]
    CODECS[name].decode(body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little"))


def dense(data: bytes) -> None:
    """A Zarr chunk, its checksum made right; the first byte chooses the codec."""
    array = DENSE[sorted(DENSE)[data[0] % len(DENSE)]] if data else DENSE["step"]
    array.decode(_with_crc(data[1:]), 5, "chunk")


def index(data: bytes) -> None:
    """The index of a Zarr shard, its checksum made right."""
    DENSE["step"].parse_index(_with_crc(data), 1000, 2, "index")


def seeds() -> dict[str, list[bytes]]:
    """Sound inputs of every target."""
    found: dict[str, list[bytes]] = {name: [] for name in TARGETS}
    for number, (name, form) in enumerate(sorted(FORMS.items())):
        example = form.encode(make_record(form.plan, 1))
        batch = rows.batch(form.schema, {**example.values, "number": 1})
        found["message"].append(bytes([number]) + batch.serialize().to_pybytes())
        found["plan"].append(form.plan.to_bytes())
        found["codec"].append(canonical.sign(form.codec_body))
        if not form.portable:
            at = RECORDS.index(name)
            found["record"].append(bytes([at]) + bytes(example.values["record"]))
            found["records"].append(bytes([at]) + bytes(example.values["record"]))
        found["file"].append(bytes([number]) + _file(form))
    for number, (_, array) in enumerate(sorted(DENSE.items())):
        values = np.linspace(-3, 3, 60, dtype=np.float32).reshape(5, 12)
        found["dense"].append(bytes([number]) + array.encode(values)[:-4])
    found["zarr"].append(DENSE["bf16"].metadata())
    found["group"].append(group_metadata({"hidden.2": DENSE["bf16"], "hidden.3": DENSE["step"]}))
    found["http"] += SEEDS
    found["parquet"].append(_index())
    found["index"].append(struct.pack("<QQQQ", 0, 10, 10, 10))
    for file in TABLES.files.values():
        found["table"].append(file)
    found["manifest"].append(_sample_manifest())
    found["receipt"].append(_sample_receipt())
    return found


def _file(form: Format) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, form.schema) as writer:
        for number in range(3):
            values = form.encode(make_record(form.plan, number)).values
            writer.write_batch(rows.batch(form.schema, {**values, "number": number}))
    return sink.getvalue()


def _index() -> bytes:
    texts = {field.name: ["a", "b", "c"] for field in SCHEMA if field.type == pa.string()}
    columns = {field.name: texts.get(field.name, [1, 2, 3]) for field in SCHEMA}
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, SCHEMA, **PARQUET) as writer:
        writer.write_table(pa.table(columns, schema=SCHEMA))
    return sink.getvalue()


def _sample_receipt() -> bytes:
    from stillroom.cache_schemas.manifest import FileEntry, Records

    form = FORMS["exact"]
    entry = FileEntry(bytes=1, sha256="0" * 64)
    columns = {name: [0, 0] for name in ("offset", "bytes", "num_tokens", "num_rows")}
    columns |= {name: ["", ""] for name in ("example_id", "source", "preview")}
    columns |= {"xxh3": ["0" * 16] * 2, "entropy": [None, 1.0], "tail": [0.5, None]}
    names = layout.shard_files(0, list(form.dense))
    return ShardReceipt(
        plan=form.plan.digest,
        codec=form.codec_digest,
        shard=0,
        files=dict.fromkeys(names, entry),
        records=Records(**columns),
    ).to_bytes()


def _sample_manifest() -> bytes:
    from stillroom.cache_schemas.manifest import ShardTable

    form = FORMS["small"]
    table = ShardTable(num_tokens=[1], num_rows=[1], bytes=[1], receipt=["0" * 64])
    return Manifest(plan=form.plan.facts, codec=form.codec_body, files={}, shards=table).to_bytes()


def _signed(data: bytes) -> bytes:
    """The document with a digest that fits, where it is a JSON object at all."""
    body = canonical.parse(data, "fuzz")
    if not isinstance(body, dict):
        return data
    body.pop(canonical.DIGEST, None)
    return canonical.sign(body)


def _with_crc(body: bytes) -> bytes:
    return body + struct.pack("<I", google_crc32c.value(body))


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        *(manifest, plan, receipt, codec, table, message, record, dense, index),
        *(file, records, parquet, zarr, group, http),
    )
}


def survives(name: str, data: bytes) -> bool:
    """True if the target took the bytes, False if it refused them as it should.

    Raises:
        whatever the target lets through: a finding.
    """
    try:
        TARGETS[name](data)
    except (StillroomError, FileNotFoundError):
        return False
    return True
