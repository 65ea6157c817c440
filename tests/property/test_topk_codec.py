"""The codecs as any numcodecs or Zarr user meets them: found by name, round trip, bad settings."""

import json
import subprocess
import sys
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import zarr
import zarr.storage

from stillroom.cache_schemas.dense_codec import CODEC_NAME, RowScaled
from stillroom.cache_schemas.errors import CacheError, ShardCorrupt
from stillroom.cache_schemas.topk_codec import CODEC_ID, PAIR, TopkRows
from tests.codec_samples import record, sorted_rows

VOCAB = 400


def rows_of(signals: dict) -> np.ndarray:
    rows = np.empty((len(signals["topk_ids"]), signals["topk_ids"].shape[1] + 1), dtype=PAIR)
    rows["id"] = np.pad(signals["topk_ids"], ((0, 0), (0, 1)), constant_values=-1)
    rows["logprob"][:, :-1] = signals["topk_logprobs"]
    rows["logprob"][:, -1] = signals["tail_logprob"]
    return rows


def lists_of(rows: np.ndarray) -> dict:
    return {"topk_ids": rows["id"][:, :-1], "topk_logprobs": rows["logprob"][:, :-1]}


@pytest.fixture(scope="module")
def rows():
    return rows_of(record(0, rows=200, k=12, vocab=VOCAB, nucleus=True))


@pytest.mark.parametrize("profile", ["small", "strict", "exact"])
def test_rows_round_trip_through_numcodecs(rows, profile):
    codec = TopkRows.fit(profile, rows, VOCAB)
    named = numcodecs.get_codec(json.loads(json.dumps(codec.get_config())))
    blob = codec.encode(rows)
    found = np.asarray(named.decode(blob)).view(PAIR).reshape(rows.shape)
    given, back = sorted_rows(lists_of(rows)), sorted_rows(lists_of(found))
    np.testing.assert_array_equal(back[0], given[0])
    if profile == "exact":
        np.testing.assert_array_equal(found, rows)
    else:
        held = given[0] >= 0
        np.testing.assert_allclose(back[1][held], given[1][held], atol=1.0)
    assert len(blob) < rows.nbytes / 2


def test_rows_are_kept_in_a_zarr_array(rows):
    store = zarr.storage.MemoryStore()
    settings = {"chunks": (50, rows.shape[1]), "compressors": TopkRows.fit("exact", rows, VOCAB)}
    array = zarr.create_array(store, shape=rows.shape, dtype=PAIR, zarr_format=2, **settings)
    array[...] = rows
    np.testing.assert_array_equal(zarr.open_array(store, mode="r")[...], rows)


def test_damaged_bytes_are_refused(rows):
    codec = TopkRows.fit("small", rows, VOCAB)
    blob = bytearray(codec.encode(rows))
    blob[len(blob) // 2] ^= 1
    with pytest.raises(ShardCorrupt, match="checksum"):
        codec.decode(bytes(blob))


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "|O"},
        {"shape": [1 << 40]},
        {"shape": [-1]},
        {"zlib": "not base64"},
        {"zlib": "AAAA"},
        {"more": 1},
    ],
)
def test_hostile_tables_are_refused(rows, change):
    config = TopkRows.fit("small", rows, VOCAB).get_config()
    tables = {name: table | change for name, table in config["tables"].items()}
    with pytest.raises(CacheError):
        numcodecs.get_codec({**config, "tables": tables})


def printed(program: str) -> str:
    """What a program that has our packages installed, and nothing else of ours, prints."""
    found = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True)
    assert found.stderr == ""
    return found.stdout.strip()


@pytest.mark.parametrize(
    ("group", "name", "codec"),
    [("zarr.codecs", CODEC_NAME, RowScaled), ("numcodecs.codecs", CODEC_ID, TopkRows)],
)
def test_codecs_are_found_by_whoever_installed_us(group, name, codec):
    find = f"import importlib.metadata as m; (e,) = m.entry_points(group={group!r}, name={name!r})"
    assert printed(f"{find}; print(e.load().__name__)") == codec.__name__


def test_a_program_that_never_imports_us_reads_our_arrays():
    array = Path(__file__).parents[1] / "golden" / "cache-v1" / "small" / "dense" / "hidden.2"
    program = f"import zarr; print(abs(zarr.open_array({str(array)!r}, mode='r')[0]).sum() > 0)"
    assert printed(program) == "True"
