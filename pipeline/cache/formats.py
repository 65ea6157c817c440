"""TeacherRecord <-> what is stored of it, under one plan and one fitted codec.

One idea: `Format` is everything needed to turn a record into bytes and back, opened once per cache;
the writer, the reader and the checks all use the same one, so they cannot disagree. It opens no
shard and chooses no path.
"""

import io
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stillroom.cache_schemas import canonical, layout, rows
from stillroom.cache_schemas.candidates import check_distances, check_ids
from stillroom.cache_schemas.dense_array import DenseArray
from stillroom.cache_schemas.errors import CacheError, ShardCorrupt
from stillroom.cache_schemas.manifest import FORMAT_VERSION, Plan, check_version
from stillroom.cache_schemas.record_codec import MEAN_KL, TOKENS, RowCodec
from stillroom.cache_schemas.signals import EXAMPLE_SIGNALS
from stillroom.pipeline.cache.storage.protocol import Storage
from stillroom.pipeline.record import Example, ImageSpan, TeacherRecord

MAX_TABLE_BYTES = 1 << 28
NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..{'descr': '(?P<descr>[<|][iuf][1248])', 'fortran_order': False, "
    rb"'shape': \((?P<shape>(?:\d{1,10}, ?){0,3}\d{0,10})\), } *\n",
    re.DOTALL,
)
UNFITTED = ("exact", "portable")
"""Profiles without tables."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as it is stored: the columns of its row, and its chunk of each dense array."""

    values: dict[str, Any]
    chunks: dict[str, bytes]


class Format:
    """How the records of one cache are stored.

    Args:
        plan: the cache's plan.
        codec: the fitted codec of its row signals.
        present: dense signals that are there; None for all (a partial copy may lack some).
    """

    def __init__(self, plan: Plan, codec: RowCodec, present: Collection[str] | None = None):
        self.plan, self.codec = plan, codec
        self.codec_body = {"format_version": FORMAT_VERSION, "rows": codec.facts()}
        self.codec_digest = canonical.digest(self.codec_body)
        self.schema = rows.schema(plan, codec.nested)
        self.portable = rows.is_portable(plan)
        self.all_dense = dense_arrays(plan)
        self.dense = {
            name: array
            for name, array in self.all_dense.items()
            if present is None or name in present
        }

    def encode(self, record: TeacherRecord) -> Encoded:
        """One record as it is stored.

        Raises:
            ValueError: the record does not have exactly the plan's signals.
            CacheError: the codec cannot hold a value within its bound.
        """
        self._check_signals(record)
        example = record.example
        tokens = np.asarray(example.token_ids, dtype=np.int32)
        values = {
            "example_id": example.example_id,
            "document_id": example.document_id,
            "source": example.source,
            "weight": float(example.weight),
            "first_row": int(record.first_row),
            "loss_mask": np.asarray(example.loss_mask, dtype=bool),
            "images": [
                {"sha256": image.sha256, "start": image.start, "length": image.length}
                for image in example.images
            ],
            "hidden_positions": np.asarray(record.hidden_positions, dtype=np.int32),
            "dense_lengths": np.array([len(record.signals[n]) for n in self.dense], dtype=np.int32),
        }
        said = {TOKENS: tokens} | {name: record.signals[name] for name in self.plan.row_signals}
        values |= said if self.portable else {rows.PAYLOAD: self.codec.encode(said)}
        values |= self._example_signals(record.signals, self.plan.example_signals)
        chunks = {name: array.encode(record.signals[name]) for name, array in self.dense.items()}
        return Encoded(values, chunks)

    def record(
        self,
        values: Mapping[str, Any],
        dense: Mapping[str, np.ndarray],
        signals: Collection[str] | None = None,
    ) -> TeacherRecord:
        """The inverse of `encode`, with the row signals named in `signals` (None: all).

        Raises:
            ShardCorrupt: the values contradict each other.
        """
        wanted = [n for n in self.plan.row_signals if signals is None or n in signals]
        said = self._row_signals(values, [*wanted, TOKENS])
        tokens = said.pop(TOKENS)
        example = Example(
            example_id=values["example_id"],
            document_id=values["document_id"],
            source=values["source"],
            token_ids=tokens,
            loss_mask=values["loss_mask"],
            images=tuple(ImageSpan(**image) for image in values.get("images", ())),
            weight=values["weight"],
        )
        positions = values.get("hidden_positions", np.empty(0, dtype=np.int32))
        kept = [n for n in self.plan.example_signals if signals is None or n in signals]
        whole = dict(dense) | self._example_signals(values, kept)
        record = TeacherRecord(example, values["first_row"], said | whole, positions)
        _check_shapes(record, said)
        return record

    def stored(self, record: TeacherRecord) -> TeacherRecord:
        """A record as a reader would get it back, had it been written."""
        tokens = np.asarray(record.example.token_ids, dtype=np.int32)
        said = {name: record.signals[name] for name in self.plan.row_signals}
        if not self.portable:
            payload = self.codec.encode({TOKENS: tokens} | said)
            said = dict(self.codec.decode(payload, list(said)))
        where = f"example {record.example.example_id}"
        for name, array in self.dense.items():
            values = record.signals[name]
            said[name] = array.decode(array.encode(values), len(values), where)
        return replace(record, signals=said)

    def dense_lengths(self, values: Mapping[str, Any]) -> dict[str, int]:
        """Positions that one example uses of each dense signal."""
        lengths = values.get("dense_lengths", ())
        if len(lengths) != len(self.all_dense):
            raise ShardCorrupt("dense_lengths does not fit the plan", where=values["example_id"])
        return {name: int(length) for name, length in zip(self.all_dense, lengths)}

    def _row_signals(self, values: Mapping[str, Any], names: list[str]) -> dict[str, np.ndarray]:
        if not self.portable:
            said = self.codec.decode(values[rows.PAYLOAD], names)
        else:
            num_rows = len(values[TOKENS]) - 1 - values["first_row"]
            said = {n: _unflatten(n, values[n], num_rows, self.codec) for n in names}
        if missing := set(names) - set(said):
            raise ShardCorrupt(f"lacks {sorted(missing)}", where=f"example {values['example_id']}")
        return said

    def _example_signals(
        self, values: Mapping[str, Any], names: Collection[str]
    ) -> dict[str, np.ndarray]:
        """Lists about a whole example, checked against the plan's catalogue."""
        found = {n: np.asarray(values[n], dtype=EXAMPLE_SIGNALS[n].dtype) for n in names}
        capture = self.plan.facts["capture"]
        if "candidate_ids" in found:
            check_ids(found["candidate_ids"], capture["candidates"], capture["catalogue"]["items"])
        if "candidate_distances" in found:
            check_distances(found["candidate_distances"], capture["candidates"])
        return found

    def _check_signals(self, record: TeacherRecord) -> None:
        expected = {*self.plan.row_signals, *self.dense, *self.plan.example_signals}
        if set(record.signals) != expected:
            found = sorted(set(record.signals) ^ expected)
            raise ValueError(f"record and plan differ in signals {found}")
        _check_shapes(record, {name: record.signals[name] for name in self.plan.row_signals})


def open_codec(storage: Storage, plan: Plan) -> RowCodec | None:
    """The codec of a cache, from codec.json and its tables; None before it was fitted.

    Raises:
        ShardCorrupt: the description or a table is damaged or missing.
    """
    if storage.size(layout.CODEC) is None:
        return None
    where = f"{storage.location}/{layout.CODEC}"
    return read_codec(storage, canonical.check(storage.read(layout.CODEC), where), plan)


def read_codec(storage: Storage, body: Mapping[str, Any], plan: Plan) -> RowCodec:
    """The codec that the body of codec.json (also kept in the manifest) describes."""
    where = f"{storage.location}/{layout.CODEC}"
    check_version(body.get("format_version"), where)
    facts: Any = body.get("rows")
    try:
        tables = {name: _load_table(storage, sha) for name, sha in facts["tables"].items()}
        codec = RowCodec.from_facts(facts, tables)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ShardCorrupt(f"describes no codec ({error!r})", where=where) from None
    _check_codec(codec, plan, where)
    return codec


def publish_codec(storage: Storage, plan: Plan, codec: RowCodec) -> RowCodec:
    """Store a codec unless there is one; returns the one that all workers share."""
    facts = codec.facts()
    for name, sha in facts["tables"].items():
        storage.create(layout.table(sha), table_bytes(codec.tables[name]))
    body = {"format_version": FORMAT_VERSION, "rows": facts}
    storage.create(layout.CODEC, canonical.sign(body, indent=1))
    shared = open_codec(storage, plan)
    assert shared is not None
    return shared


def codec_sizes(plan: Plan) -> dict[str, Any]:
    """The sizes that a `RowCodec` takes, as the plan fixes them."""
    capture = plan.facts["capture"]
    return {
        "k": capture.get("k", 0),
        "vocab_size": plan.facts["teacher"].get("vocab_size", 0),
        "draws": capture.get("tail_draws", 0),
        "temperatures": len(capture.get("temperatures", (1.0,))),
    }


def _check_codec(codec: RowCodec, plan: Plan, where: str) -> None:
    facts = codec.facts()
    capture = plan.facts["capture"]
    expected = {"profile": capture.get("profile"), **codec_sizes(plan)}
    if "mean_kl" in facts:
        expected["mean_kl"] = capture.get("mean_kl", MEAN_KL)
    for key, value in expected.items():
        if facts[key] != value:
            raise ShardCorrupt(f"'{key}' is {facts[key]!r}", expected=f"{value!r}", where=where)


def table_bytes(table: np.ndarray) -> bytes:
    """The file of a table."""
    stream = io.BytesIO()
    np.save(stream, np.ascontiguousarray(table), allow_pickle=False)
    return stream.getvalue()


def _load_table(storage: Storage, sha: str) -> np.ndarray:
    name = layout.table(sha)
    where = f"{storage.location}/{name}"
    # It comes from a file and becomes a path.
    if len(sha) != 64 or not set(sha) <= set("0123456789abcdef"):
        raise ShardCorrupt("a table's name is not a sha256", where=layout.CODEC)
    try:
        return parse_table(storage.read(name))
    except FileNotFoundError:
        raise ShardCorrupt("the table is missing", where=where, remedy="Get it again.") from None
    except (ValueError, TypeError) as error:
        raise ShardCorrupt(f"is not a table ({str(error)[:80]})", where=where) from None


def parse_table(data: bytes) -> np.ndarray:
    """An array out of an npy file of version 1.0, its header read by pattern, not evaluated.

    Raises:
        ValueError: it is anything else, or the header names another size than the bytes have.
    """
    header = NPY_HEADER.match(data)
    if header is None:
        raise ValueError("not an npy file of version 1.0 with plain numbers")
    shape = tuple(int(side) for side in header["shape"].split(b",") if side.strip())
    dtype = np.dtype(header["descr"].decode())
    body = data[10 + int.from_bytes(data[8:10], "little") :]  # behind magic, version, header
    if len(body) != dtype.itemsize * math.prod(shape) or len(data) > MAX_TABLE_BYTES:
        raise ValueError(f"its header names shape {shape}, its bytes are {len(body)}")
    return np.frombuffer(body, dtype=dtype).reshape(shape)  # no copy; read-only


def dense_arrays(plan: Plan) -> dict[str, DenseArray]:
    """The array of every dense signal, in name order: JSON keeps no order of its own."""
    examples = (plan.num_examples, plan.examples_per_shard)
    return {
        name: DenseArray(*examples, shape["positions"], shape["width"], shape["codec"])
        for name, shape in sorted(plan.dense_signals.items())
    }


def _unflatten(name: str, flat: np.ndarray, num_rows: int, codec: RowCodec) -> np.ndarray:
    if name == TOKENS:
        return flat
    shape = (num_rows, *codec.width(name))
    rows_differ = codec.nested and flat.ndim > 1 and len(flat) != num_rows
    if flat.size != int(np.prod(shape)) or rows_differ:
        raise ShardCorrupt(f"{name} has {flat.size} values", expected=f"{int(np.prod(shape))}")
    return flat.reshape(shape)


def _check_shapes(record: TeacherRecord, row_signals: Mapping[str, np.ndarray]) -> None:
    """Lengths that must agree, whoever made the record."""
    num_tokens, example = len(record.example.token_ids), record.example
    where = f"example {example.example_id}"
    if len(example.loss_mask) != num_tokens or not 0 <= record.first_row < max(num_tokens, 1):
        raise ShardCorrupt("tokens, mask and first row do not fit", where=where)
    for name, array in row_signals.items():
        if len(array) != record.num_rows:
            raise CacheError(f"{name} has {len(array)} rows, not {record.num_rows}", where=where)
