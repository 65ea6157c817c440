"""A reader of caches written from FORMAT.md alone: NumPy, pyarrow, xxhash and what its two
neighbours need; nothing of this repository.

One idea: if this reads every cache, whatever its profile, a stranger needs nothing of ours. It is
slow, checks the chain of hashes by assertion and holds a shard in memory.
"""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from tests.golden import mini_dense_reader, mini_record_reader

WIDTHS = {"topk_ids": "k", "topk_logprobs": "k", "draw_ids": "draws", "draw_counts": "draws",
          "lse": "temperatures"}  # fmt: skip
INT32 = {"topk_ids", "token_rank", "draw_ids", "draw_counts"}
EXAMPLE_SIGNALS = {
    "candidate_ids": pa.int32(),
    "candidate_distances": pa.float32(),
    "written_ids": pa.int32(),
}


def document(path, sha256=None):
    """The body of a JSON document whose digest holds (section 2)."""
    data = path.read_bytes()
    assert sha256 in (None, hashlib.sha256(data).hexdigest()), path
    body = json.loads(data)
    named = body.pop("digest")
    assert digest(body) == named, path
    return body


def digest(body):
    """Of the canonical form."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class Cache:
    """A sealed cache, its manifest and tables checked."""

    def __init__(self, root):
        self.root = Path(root)
        self.manifest = document(self.root / "manifest.json")
        assert self.manifest["format_version"] == 1
        self.plan, self.codec = self.manifest["plan"], self.manifest["codec"]["rows"]
        self.row_signals = self.plan["signals"]["rows"]
        self.example_signals = self.plan["signals"].get("examples", [])
        self.dense = dict(sorted(self.plan["signals"]["dense"].items()))
        self.tables = {name: self._table(sha) for name, sha in self.codec["tables"].items()}
        for name, entry in self.manifest["files"].items():
            data = (self.root / name).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (
                entry["bytes"],
                entry["sha256"],
            )

    def _table(self, sha):
        table = np.load(io.BytesIO((self.root / f"tables/{sha}.npy").read_bytes()))
        head = f"{table.dtype.str}{table.shape}".encode()
        assert hashlib.sha256(head + table.tobytes()).hexdigest() == sha
        return table

    def __iter__(self):
        """Every example as a dict of plain values and arrays, in order."""
        for shard, sha256 in enumerate(self.manifest["shards"]["receipt"]):
            name = f"receipts/{shard // 1000:03d}/{shard:06d}.json"
            receipt = document(self.root / name, sha256)
            assert receipt["plan"] == digest({"facts": self.plan})
            assert receipt["codec"] == digest(self.manifest["codec"])
            yield from self._shard(shard, receipt)

    def _shard(self, shard, receipt):
        rows = f"rows/{shard // 1000:03d}/{shard:06d}.arrow"
        names = {rows: None} | {f"dense/{name}/c/{shard}/0/0": name for name in self.dense}
        assert names.keys() == receipt["files"].keys()
        files = {name: (self.root / name).read_bytes() for name in names}
        for name, data in files.items():
            assert hashlib.sha256(data).hexdigest() == receipt["files"][name]["sha256"]
        per_shard, records = self.plan["shards"]["examples_per_shard"], receipt["records"]
        for position, start in enumerate(records["offset"]):
            message = files[rows][start : start + records["bytes"][position]]
            assert xxhash.xxh3_64_hexdigest(message) == records["xxh3"][position]
            batch = pa.ipc.read_record_batch(pa.py_buffer(message), self.schema())
            values = {name: batch.column(name)[0] for name in batch.schema.names}
            assert values["number"].as_py() == shard * per_shard + position
            found = self._example(values)
            for at, (name, facts) in enumerate(self.dense.items()):
                used = values["dense_lengths"][at].as_py()
                data = files[f"dense/{name}/c/{shard}/0/0"]
                chunk = mini_dense_reader.chunk_of(data, position, per_shard)
                if "chunks" in records:
                    assert xxhash.xxh3_64_hexdigest(chunk) == records["chunks"][name][position]
                found[name] = mini_dense_reader.decode(chunk, facts, used)
            yield found

    def schema(self):
        """Section 3."""
        image = pa.struct([("sha256", pa.string()), ("start", pa.int32()), ("length", pa.int32())])
        int32s = pa.list_(pa.int32())
        columns = [("number", pa.int64())]
        columns += [(name, pa.string()) for name in ("example_id", "document_id", "source")]
        columns += [("weight", pa.float64()), ("first_row", pa.int32())]
        columns += [("loss_mask", pa.list_(pa.bool_()))]
        columns += [("images", pa.list_(image))] * self.plan["images"]
        columns += [("hidden_positions", int32s), ("dense_lengths", int32s)] * bool(self.dense)
        if self.codec["profile"] == "portable":
            columns += [("token_ids", int32s)]
            columns += [(name, self._listed(name)) for name in self.row_signals]
        else:
            columns += [("record", pa.binary())]
        columns += [(name, pa.list_(EXAMPLE_SIGNALS[name])) for name in self.example_signals]
        return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns])

    def _listed(self, name):
        kind = pa.int32() if name in INT32 else pa.float32()
        nested = self.codec.get("nested", False) and name in WIDTHS
        return pa.list_(pa.list_(kind)) if nested else pa.list_(kind)

    def _example(self, values):
        plain = ("example_id", "document_id", "source", "weight", "first_row")
        found = {name: values[name].as_py() for name in plain}
        found["images"] = values["images"].as_py() if "images" in values else []
        found["loss_mask"] = _flat(values["loss_mask"]).astype(bool)
        positions = values.get("hidden_positions")
        found["hidden_positions"] = np.empty(0, np.int32) if positions is None else _flat(positions)
        rows = max(len(found["loss_mask"]) - 1 - found["first_row"], 0)
        if "record" in values:
            read = mini_record_reader.read(values["record"].as_py(), self.codec, self.tables)
            found["token_ids"] = read.pop("token_ids")
            found |= {name: read[name] for name in self.row_signals}
        else:
            found["token_ids"] = _flat(values["token_ids"])
            found |= {name: self._shaped(name, values[name], rows) for name in self.row_signals}
        return found | {name: _flat(values[name]) for name in self.example_signals}

    def _shaped(self, name, value, rows):
        flat = _flat(value)
        if name not in WIDTHS:
            return flat
        return flat.reshape(rows, self.codec[WIDTHS[name]])


def _flat(value):
    """All numbers of a list, or of a list of lists, one after another."""
    values = value.values
    while isinstance(values.type, pa.ListType):
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False)
