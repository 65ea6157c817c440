"""Damage whose checksums were redone: meaning finds it, or nothing was changed that is used."""

import random
import shutil
from pathlib import Path

import pytest

from stillroom.cache_schemas import layout
from stillroom.cache_schemas.errors import ShardCorrupt
from stillroom.pipeline.cache.care.overview import overview
from stillroom.pipeline.cache.care.verification import verify
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.cache.storage.directory import DirectoryStorage
from tests import hostile_caches
from tests.synthetic_records import make_plan, write_cache


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("original") / "cache"
    return write_cache(root, make_plan(7, 3, hidden_layers=[2]))


@pytest.fixture
def cache(original, tmp_path) -> Path:
    return shutil.copytree(original, tmp_path / "cache")


def found(root: Path) -> list[str]:
    return [f"{p.name}: {p.found}" for p in verify(DirectoryStorage(root)).problems]


def test_redoing_checksums_of_nothing_changes_nothing(cache, original):
    hostile_caches.rewrite_record(cache, 4, lambda values, choice: None, random.Random(0))
    assert found(cache) == []
    assert (cache / layout.MANIFEST).read_bytes() == (original / layout.MANIFEST).read_bytes()


@pytest.mark.parametrize("name", hostile_caches.CHANGES)
def test_a_value_that_makes_no_sense_is_found(cache, name):
    change, words = hostile_caches.CHANGES[name]
    hostile_caches.rewrite_record(cache, 4, change, random.Random(0))
    (problem,) = verify(DirectoryStorage(cache)).problems
    assert problem.shard == 1
    assert "example 4" in problem.name
    assert words in problem.found


def test_swapped_dense_chunks_are_not_trained_on(cache):
    hostile_caches.swap_chunks(cache, 1)
    with pytest.raises(ShardCorrupt, match="chunk 0 is not the one that was written"):
        TeacherCache.open(cache).read(3)
    assert len(found(cache)) == 1


def test_swapped_chunks_of_a_receipt_without_sums_are_found_by_the_file(cache):
    form = hostile_caches.form_of(cache)
    hostile_caches.redo(cache, 1, chunks={})
    hostile_caches.sign_manifest(cache, form)
    assert found(cache) == []
    assert TeacherCache.open(cache).read(3).signals["hidden.2"].size
    hostile_caches.swap_chunks(cache, 1)
    with pytest.raises(ShardCorrupt, match="does not have the hash that its receipt names"):
        TeacherCache.open(cache).read(3)


@pytest.mark.parametrize(
    "claimed", [{"num_tokens": [9, 9, 9]}, {"entropy": [0.0, 0.0, 0.0]}, {"source": ["x"] * 3}]
)
def test_a_receipt_that_does_not_fit_its_records_is_found(cache, claimed):
    hostile_caches.redo(cache, 1, **claimed)
    (problem,) = found(cache)
    assert "do not fit the records" in problem


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda table: table.slice(1), "rows"),
        (lambda table: table.drop(["tail"]), "other columns"),
        (lambda table: table.take(list(range(len(table)))[::-1]), "does not say"),
    ],
)
def test_an_index_that_does_not_fit_the_receipts_is_found(cache, monkeypatch, change, words):
    form = hostile_caches.form_of(cache)
    if words == "other columns":
        schema = hostile_caches.index.SCHEMA
        smaller = schema.remove(schema.get_field_index("tail"))
        with monkeypatch.context() as patched:
            patched.setattr(hostile_caches.index, "SCHEMA", smaller)
            hostile_caches.rewrite_index(cache, form)
    else:
        hostile_caches.rewrite_index(cache, form, change)
    (problem,) = found(cache)
    assert words in problem
    assert problem.startswith("index/")


def test_rubbish_for_an_index_is_found(cache):
    (cache / layout.index(0)).write_bytes(b"<html>not found</html>")
    hostile_caches.sign_manifest(cache, hostile_caches.form_of(cache))
    assert "is not a Parquet file" in found(cache)[0]
    with pytest.raises(ShardCorrupt, match="is not a Parquet file"):
        TeacherCache.open(cache).index()


@pytest.mark.parametrize("name", [layout.PLAN, layout.CODEC])
def test_plan_and_codec_files_are_those_of_the_manifest(cache, tmp_path, name):
    other = write_cache(tmp_path / "other", make_plan(7, 3, k=6, hidden_layers=[2]))
    shutil.copy(other / name, cache / name)
    hostile_caches.sign_manifest(cache, hostile_caches.form_of(cache))
    assert "than the manifest's" in found(cache)[0]


def test_a_zarr_document_with_another_codec_is_found(cache):
    path = cache / layout.dense_metadata("hidden.2")
    path.write_bytes(path.read_bytes().replace(b'"shuffle": "shuffle"', b'"shuffle": "noshuffle"'))
    hostile_caches.sign_manifest(cache, hostile_caches.form_of(cache))
    assert "'codecs' is not the plan's" in found(cache)[0]


def test_show_binds_receipts_to_the_manifest(cache):
    path = cache / layout.receipt(0)
    path.write_bytes((cache / layout.receipt(1)).read_bytes())
    with pytest.raises(ShardCorrupt, match="is not the receipt that the manifest names"):
        overview(DirectoryStorage(cache))


def test_many_processes_find_what_one_finds(cache, monkeypatch):
    from stillroom.pipeline.cache.care import shard_checks

    hostile_caches.rewrite_record(cache, 4, *hostile_caches.CHANGES["rank 0"][:1], random.Random(0))
    alone = verify(DirectoryStorage(cache))
    monkeypatch.setattr(shard_checks, "BYTES_WORTH_A_PROCESS", 1)
    monkeypatch.setattr(shard_checks, "SHARDS_AT_A_TIME", 1)
    assert verify(DirectoryStorage(cache), workers=2) == alone
