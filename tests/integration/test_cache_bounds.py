"""A hostile cache is one message for every verb, within 500 MB and a few seconds of processor.

Each attack runs every verb in a child of its own, whose address space and processor time the
operating system limits: what passes them is killed, and the test fails.
"""

import contextlib
import io
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.cache_schemas import canonical, layout
from stillroom.cache_schemas.dense_array import DenseArray
from stillroom.cache_schemas.errors import CacheError, ShardCorrupt, StillroomError
from stillroom.cache_schemas.manifest import Plan
from stillroom.pipeline.cache import index
from stillroom.pipeline.cache.care.overview import find, overview
from stillroom.pipeline.cache.care.repair import repair
from stillroom.pipeline.cache.care.verification import verify
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.cache.sharing.copying import copy
from stillroom.pipeline.cache.storage.directory import DirectoryStorage
from tests import hostile_caches
from tests.faulty_disk import in_child
from tests.synthetic_records import make_plan, write_cache

MEGABYTES, SECONDS = 500, 20
"""Of address space above what the parent has, and of processor time for all verbs together."""
HUGE = 1 << 40
INSIDE = (3 << 23) + (1 << 22)
"""Bytes of a document that just passes the limit on its size."""


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("original") / "cache"
    write_cache(root, make_plan(7, 3, profile="small", hidden_layers=[2]))
    assert verify(DirectoryStorage(root)).problems == []  # and kernels are compiled
    return root


@pytest.fixture
def cache(original, tmp_path) -> Path:
    return shutil.copytree(original, tmp_path / "hostile" / "cache")


def everything(root: Path) -> list[str]:
    """What each verb says; a StillroomError or nothing."""
    storage = DirectoryStorage(root)

    def read_all() -> None:
        opened = TeacherCache.open(root)
        opened.index()
        for number in range(len(opened)):
            opened.read(number)

    verbs = {
        "train": read_all,
        "show": lambda: overview(storage),
        "ls": lambda: find(root.parent),
        "verify": lambda: verify(storage).problems,
        "pull": lambda: copy(storage, DirectoryStorage(root.parent.parent / "copy")),
        "repair": lambda: repair(storage),
    }
    said = []
    for name, verb in verbs.items():
        try:
            said.append(f"{name}: {verb()}")
        except StillroomError as error:
            said.append(f"{name}: refused: {error}")
    return said


def survived(root: Path) -> str:
    """What all verbs said of a cache, from a child with limits."""
    told = root.parent / "told"

    def work() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (MEGABYTES << 20),) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        with contextlib.redirect_stdout(io.StringIO()):
            told.write_text("\n".join(everything(root)))
        os._exit(0)

    status = in_child(work)
    assert status == 0, f"killed or failed: status {status}"
    return told.read_text()


def sparse(path: Path) -> None:
    path.unlink()
    with open(path, "wb") as file:
        file.truncate(HUGE)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


FILES = {
    "manifest": layout.MANIFEST,
    "plan": layout.PLAN,
    "codec": layout.CODEC,
    "rows": layout.rows(1),
    "dense": layout.dense_shard("hidden.2", 1),
    "receipt": layout.receipt(1),
    "index": layout.index(0),
    "zarr": layout.dense_metadata("hidden.2"),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("attack", [sparse, pipe], ids=["sparse", "pipe"])
def test_a_file_that_is_none_is_one_message(cache, file, attack):
    attack(cache / FILES[file])
    said = survived(cache)
    assert "Traceback" not in said
    assert any(word in said for word in ("refused", "Problem", "no regular file"))


DOCUMENTS = {
    "a long text": b'{"x":"' + b"a" * (50 << 20) + b'"}',
    "a text of escapes": b'{"x":"' + b"\\\\" * (INSIDE // 2) + b'"}',
    "a text that is not ASCII": b'{"x":"' + "\U0001f600".encode() + b"a" * (INSIDE // 4) + b'"}',
    "empty lists": b'{"x":[' + b"[]," * (INSIDE // 3) + b"[]]}",
    "many lists": b'{"x":[' + b"[]," * (50 << 20 >> 2) + b"[]]}",
    "empty objects": b'{"x":[' + b"{}," * (INSIDE // 3) + b"{}]}",
    "empty texts": b'{"x":[' + b'"",' * (INSIDE // 3) + b'""]}',
    "numbers": b'{"x":[' + b"1," * (INSIDE // 2) + b"1]}",
    "quotes": b'"' * INSIDE,
    "deep": b"[" * INSIDE,
    "closed": b"]" * INSIDE,
    "a long number": b"9" * INSIDE,
    "infinity": b'{"digest":"0","x":1e999}',
}


@pytest.mark.parametrize("number", ["1e999", "-1E999", "9" * 400 + ".0", "NaN", "Infinity"])
def test_a_number_that_is_not_finite_is_refused_where_it_is_read(number):
    with pytest.raises(ShardCorrupt, match="is not JSON"):
        canonical.parse(f'{{"x":[{number}]}}'.encode(), "a document")


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("file", ["manifest", "plan", "receipt"])
def test_a_document_that_would_be_large_is_one_message(cache, file, name):
    (cache / FILES[file]).write_bytes(DOCUMENTS[name])
    if file == "plan":
        (cache / layout.MANIFEST).unlink()
    assert "refused" in survived(cache)


@pytest.mark.parametrize(
    "shards",
    [
        {"count": 1 << 32, "examples_per_shard": 1, "num_examples": 1 << 32},
        {"count": 1 << 18, "examples_per_shard": 1 << 16, "num_examples": 1 << 34},
    ],
)
def test_a_plan_of_very_many_shards_is_quick(cache, shards):
    facts = make_plan(7, 3, profile="small", hidden_layers=[2]).facts | {"shards": shards}
    (cache / layout.PLAN).write_bytes(canonical.sign({"facts": facts}))
    (cache / layout.MANIFEST).unlink()
    assert "refused" in survived(cache)


def test_an_index_that_unpacks_to_much_is_refused(cache):
    form = hostile_caches.form_of(cache)
    text = "a" * (40 << 20)

    def long(table: pa.Table) -> pa.Table:
        column = pa.array([text] * len(table), type=pa.string())
        return table.set_column(table.column_names.index("preview"), "preview", column)

    hostile_caches.rewrite_index(cache, form, long)
    assert (cache / layout.index(0)).stat().st_size < 1 << 20
    said = survived(cache)
    assert "values and" in said
    assert "verify: [Problem(name='index/000.parquet'" in said


def test_a_dictionary_that_is_repeated_is_counted_before_it_is_written_out():
    text = "a" * (1 << 14)
    rows = 4096
    table = pa.table(
        {
            f.name: pa.array([text if f.name == "source" else 0] * rows).cast(f.type)
            for f in index.SCHEMA
        },
        schema=index.SCHEMA,
    )
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, index.SCHEMA, **index.PARQUET) as file:
        file.write_table(table)
    with pytest.raises(ShardCorrupt, match="source has 67,108,864 bytes of text"):
        index.Index(sink.getvalue(), [rows], "index").read(["source"])


def test_a_short_chunk_does_not_unpack_to_much():
    array = DenseArray(1, 1, 1 << 13, 1 << 13, {"name": "bf16", "step": None})
    one = DenseArray(1, 1, 1 << 13, 1 << 13, {"name": "bf16", "step": None})
    chunk = one.encode(np.zeros((1, 1 << 13), dtype=np.float32))
    assert len(chunk) < 1 << 21
    assert array.decode(chunk, 1, "chunk").shape == (1, 1 << 13)
    with pytest.raises(ShardCorrupt, match=r"a chunk of .* bytes for 8192 positions of 8192"):
        array.decode(chunk, 1 << 13, "chunk")


def test_a_capture_too_large_for_its_manifest_is_refused_before_it_begins():
    with pytest.raises(CacheError, match=r"Keep \d+ to a shard"):
        make_plan(1 << 20, 1)
    with pytest.raises(CacheError, match="at most 65,536 examples"):
        make_plan(1 << 20, 1 << 20)
    assert isinstance(make_plan(1 << 20, 256), Plan)
