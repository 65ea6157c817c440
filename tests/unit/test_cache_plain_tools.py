"""A cache in the hands of somebody who has other tools and no stillroom."""

import subprocess
import sys
from pathlib import Path

import datasets
import duckdb
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr

from stillroom.cache_schemas import layout
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.doors.leaving import export
from tests.synthetic_records import make_plan, write_cache

NESTED = ("topk_ids", "topk_logprobs", "draw_ids", "lse")
HEAVY = ("torch", "pyarrow", "pydantic", "numba", "transformers", "typer", "rich", "vllm")


def _written(tmp_path_factory, profile: str, codec: str) -> Path:
    sizes = {"tail_draws": 2, "hidden_layers": [2, "final"], "hidden_codec": codec}
    plan = make_plan(5, 3, 10, profile=profile, **sizes)
    return write_cache(tmp_path_factory.mktemp("plain") / "cache", plan)


@pytest.fixture(scope="module")
def portable(tmp_path_factory):
    return _written(tmp_path_factory, "portable", "bf16")


@pytest.fixture(scope="module")
def stepped(tmp_path_factory):
    return _written(tmp_path_factory, "small", "step")


def rows_file(cache: Path) -> Path:
    return cache / layout.rows(0)


def by_pyarrow(cache):
    return pa.ipc.open_file(str(rows_file(cache))).read_all().to_pydict()


def by_pandas(cache):
    return pa.ipc.open_file(str(rows_file(cache))).read_pandas().to_dict("list")


def by_polars(cache):
    return pytest.importorskip("polars").read_ipc(rows_file(cache)).to_dict(as_series=False)


def by_duckdb(cache):
    told = pa.ipc.open_file(str(rows_file(cache))).read_all()  # noqa: F841
    return duckdb.sql("select * from told").to_arrow_table().to_pydict()


def by_datasets(cache):
    files, kept = str(cache / "rows/*/*.arrow"), str(cache.parent / "loaded")
    return datasets.load_dataset("arrow", data_files=files, cache_dir=kept)["train"].to_dict()


@pytest.mark.parametrize("read", [by_pyarrow, by_pandas, by_polars, by_duckdb, by_datasets])
def test_rows_of_the_portable_profile_are_nested_lists(portable, read):
    found = read(portable)
    cache = TeacherCache.open(portable)
    for number in range(3):
        record = cache[number]
        assert list(found["token_ids"][number]) == record.example.token_ids.tolist()
        for name in NESTED:
            rows = [list(row) for row in found[name][number]]
            np.testing.assert_array_equal(rows, record.signals[name], err_msg=name)
        np.testing.assert_array_equal(found["entropy"][number], record.signals["entropy"])


def parquet_by_pyarrow(files):
    return pq.read_table(files).to_pydict()


def parquet_by_pandas(files):
    return pandas.read_parquet(files).to_dict("list")


def parquet_by_polars(files):
    polars = pytest.importorskip("polars")
    return polars.read_parquet(f"{files}/*.parquet").to_dict(as_series=False)


def parquet_by_duckdb(files):
    return duckdb.sql(f"select * from '{files}/*.parquet'").to_arrow_table().to_pydict()


def parquet_by_datasets(files):
    cache = str(files.parent / "loaded")
    return datasets.load_dataset("parquet", data_dir=str(files), cache_dir=cache)["train"].to_dict()


PARQUET = [
    parquet_by_pyarrow,
    parquet_by_pandas,
    parquet_by_polars,
    parquet_by_duckdb,
    parquet_by_datasets,
]


@pytest.mark.parametrize("read", PARQUET)
def test_the_index_is_a_table(stepped, read):
    found = read(stepped / "index")
    assert list(found["example_id"]) == [record.example.example_id for record in _opened(stepped)]
    assert list(found["number"]) == list(range(5))


@pytest.mark.parametrize("read", PARQUET)
def test_any_profile_is_exported_to_nested_lists(stepped, tmp_path, read):
    export(_opened(stepped), tmp_path / "out", "parquet")
    found = read(tmp_path / "out")
    for number, record in enumerate(_opened(stepped)):
        for name in NESTED:
            rows = [list(row) for row in found[name][number]]
            np.testing.assert_array_equal(rows, record.signals[name], err_msg=name)


def test_dense_signals_are_a_group_that_needs_no_listing(portable):
    group = zarr.open_consolidated(str(portable / "dense"), mode="r")
    assert sorted(group.array_keys()) == ["hidden.2", "hidden.final"]
    array = group["hidden.2"]
    assert "bits of bfloat16" in array.attrs["how_to_read"]
    for number, record in enumerate(_opened(portable)):
        _assert_starts_with(_from_bits(array[number]), record.signals["hidden.2"])


def test_tensorstore_opens_them_without_zarr(portable):
    tensorstore = pytest.importorskip("tensorstore")
    kvstore = {"driver": "file", "path": str(portable / "dense" / "hidden.2")}
    array = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result()
    for number, record in enumerate(_opened(portable)):
        bits = array[number].read().result()
        _assert_starts_with(_from_bits(bits), record.signals["hidden.2"])


ALONE = f"""
import sys
for name in {HEAVY!r}:
    sys.modules[name] = None
import zarr
array = zarr.open_group(sys.argv[1], mode="r")["hidden.2"]
sys.stdout.buffer.write(array[:].tobytes())
assert "stillroom.pipeline" not in sys.modules
"""


def test_the_codec_of_the_default_needs_little_more_than_zarr(stepped):
    """What `how_to_read` and the card say: no torch, and nothing else that is large."""
    command = [sys.executable, "-c", ALONE, str(stepped / "dense")]
    told = subprocess.run(command, capture_output=True, check=True).stdout
    found = np.frombuffer(told, np.float32).reshape(5, 10, 12)
    for number, record in enumerate(_opened(stepped)):
        _assert_starts_with(found[number], record.signals["hidden.2"])
    about = zarr.open_group(str(stepped / "dense"), mode="r")["hidden.2"].attrs["how_to_read"]
    assert "pip install --no-deps stillroom" in about
    assert about.partition("pip install --no-deps")[2][:10] in (stepped / "README.md").read_text()


def _opened(path: Path) -> TeacherCache:
    return TeacherCache.open(path)


def _from_bits(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def _assert_starts_with(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(found[: len(expected)], expected)
    assert not found[len(expected) :].any()
