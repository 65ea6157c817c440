"""A reader of `portable` caches written from FORMAT.md alone: NumPy, pyarrow, the standard library.

One idea: if this works, a stranger needs nothing of ours. It imports nothing from this repository
and reads no dense signals.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa

WIDE = {"topk_ids", "topk_logprobs", "draw_ids", "draw_counts", "lse"}


def document(path):
    """The body of a JSON document whose digest holds."""
    body = json.loads(path.read_bytes())
    named = body.pop("digest")
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    assert hashlib.sha256(canonical.encode()).hexdigest() == named, path
    return body


def read_cache(root):
    """Every example as a dict of plain values and arrays, in order."""
    root = Path(root)
    manifest = document(root / "manifest.json")
    assert manifest["format_version"] == 1
    facts = manifest["plan"]
    assert facts["capture"]["profile"] == "portable"
    for shard, expected in enumerate(manifest["shards"]["receipt"]):
        path = root / f"receipts/{shard // 1000:03d}/{shard:06d}.json"
        assert hashlib.sha256(path.read_bytes()).hexdigest() == expected
        yield from read_shard(root, shard, document(path), facts)


def read_shard(root, shard, receipt, facts):
    """The examples of one shard, each from its own bytes."""
    name = f"rows/{shard // 1000:03d}/{shard:06d}.arrow"
    data = (root / name).read_bytes()
    assert hashlib.sha256(data).hexdigest() == receipt["files"][name]["sha256"]
    schema = pa.ipc.open_file(pa.py_buffer(data)).schema
    records = receipt["records"]
    for position, start in enumerate(records["offset"]):
        message = data[start : start + records["bytes"][position]]
        batch = pa.ipc.read_record_batch(pa.py_buffer(message), schema)
        number = shard * facts["shards"]["examples_per_shard"] + position
        assert batch.column("number")[0].as_py() == number
        yield example(batch, facts["signals"]["rows"])


def example(batch, row_signals):
    """One record batch as plain values."""
    values = {name: batch.column(name)[0] for name in batch.schema.names}
    plain = ("example_id", "document_id", "source", "weight", "first_row")
    found = {name: values[name].as_py() for name in plain}
    found["token_ids"] = np.asarray(values["token_ids"].as_py(), dtype=np.int32)
    found["loss_mask"] = np.asarray(values["loss_mask"].as_py(), dtype=bool)
    rows = len(found["token_ids"]) - 1 - found["first_row"]
    for name in row_signals:
        flat = values[name].values.to_numpy(zero_copy_only=False)
        found[name] = flat.reshape(rows, -1) if name in WIDE else flat
    return found
