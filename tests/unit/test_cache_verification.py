"""`verify` finds every kind of damage and `repair` takes back exactly what is damaged."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from stillroom.cache_schemas import layout
from stillroom.cache_schemas.errors import CacheError, ShardCorrupt
from stillroom.cache_schemas.lists import Lists
from stillroom.cache_schemas.manifest import DefinitionCheck
from stillroom.pipeline.cache.care.meaning import check_record
from stillroom.pipeline.cache.care.repair import repair
from stillroom.pipeline.cache.care.verification import verify
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.cache.storage.directory import DirectoryStorage
from stillroom.pipeline.cache.writer import CacheWriter
from tests import hostile_caches
from tests.cache_trials import contents
from tests.synthetic_records import make_plan, make_record, records_of, write_cache

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def sealed(original, tmp_path):
    return shutil.copytree(original, tmp_path / "cache")


def flip(path, bit=None):
    data = bytearray(path.read_bytes())
    bit = len(data) * 4 if bit is None else bit
    data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(data)


def test_a_sound_cache_has_no_problem(sealed, plan):
    report = verify(DirectoryStorage(sealed))
    assert report.rounding is None
    assert (report.problems, report.notes) == ([], [])
    assert (report.num_shards, report.num_examples) == (4, 10)
    assert report.num_tokens == TeacherCache.open(sealed).manifest.num_tokens


@pytest.mark.parametrize("name", [layout.rows(1), layout.dense_shard("hidden.2", 1)])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "swap"])
def test_damage_of_a_shard_is_found_and_repaired(sealed, plan, name, damage):
    before = contents(sealed)
    path = sealed / name
    if damage == "flip":
        flip(path)
    elif damage == "truncate":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "delete":
        path.unlink()
    else:
        other = write_cache(sealed.parent / "other", plan, seed=1)
        shutil.copy(other / name, path)
    report = verify(DirectoryStorage(sealed))
    assert report.bad_shards == [1]
    assert report.num_shards == 3

    done = repair(DirectoryStorage(sealed))
    assert done.shards == [1]
    assert not done.sealed
    writer = CacheWriter.open(sealed, plan)
    assert writer.missing() == [1]
    writer.write(1, records_of(plan, 1))
    writer.seal()
    assert contents(sealed) == before


@pytest.mark.parametrize(
    "name",
    [
        layout.MANIFEST,
        layout.PLAN,
        layout.CODEC,
        layout.index(0),
        layout.dense_metadata("hidden.2"),
        layout.DENSE_GROUP,
    ],
)
def test_damage_of_what_follows_from_the_rest_is_restored(sealed, plan, name):
    before = contents(sealed)
    flip(sealed / name)
    if name == layout.MANIFEST:
        with pytest.raises(ShardCorrupt):
            verify(DirectoryStorage(sealed))
    else:
        assert [p.name for p in verify(DirectoryStorage(sealed)).problems] == [name]
    done = repair(DirectoryStorage(sealed))
    assert (done.shards, done.sealed) == ([], True)
    assert contents(sealed) == before


def test_a_group_that_makes_sense_and_is_another_is_found(sealed):
    """Redone checksums and all: a plain tool would believe it."""
    path = sealed / layout.DENSE_GROUP
    right = path.read_text()
    path.write_text(right.replace("uint16", "float16"))
    hostile_caches.sign_manifest(sealed, hostile_caches.form_of(sealed))
    assert [p.name for p in verify(DirectoryStorage(sealed)).problems] == [layout.DENSE_GROUP]
    path.write_text(right.replace("stillroom", "my"))
    hostile_caches.sign_manifest(sealed, hostile_caches.form_of(sealed))
    assert verify(DirectoryStorage(sealed)).problems == []  # words are for people


def test_repair_of_a_copy_keeps_what_was_noted_of_the_definition(sealed):
    """A copy has no definition.json, only a manifest that says the same."""
    noted = DefinitionCheck(done=True, tokens=7, logprob=0.5)
    form = hostile_caches.form_of(sealed)
    hostile_caches.sign_manifest(sealed, form, definition=noted.model_dump(mode="json"))
    flip(sealed / layout.index(0))
    assert repair(DirectoryStorage(sealed)).sealed
    assert TeacherCache.open(sealed).manifest.definition == noted


def test_repair_leaves_metadata_of_the_first_caches_as_it_is(tmp_path):
    """They lack the group and the words for people, and a damaged index is no reason to touch
    what their manifest binds."""
    old = shutil.copytree(GOLDEN / "cache-v1" / "small", tmp_path / "cache")
    before = contents(old)
    assert repair(DirectoryStorage(old)).sealed
    assert contents(old) == before
    flip(old / layout.index(0))
    assert repair(DirectoryStorage(old)).sealed
    metadata = layout.dense_metadata("hidden.2")
    assert contents(old)[metadata] == before[metadata]
    assert verify(DirectoryStorage(old)).problems == []


def test_a_receipt_of_another_cache_is_named(sealed, plan):
    other = write_cache(sealed.parent / "other", make_plan(hidden_layers=[2], seed=7))
    shutil.copy(other / layout.receipt(2), sealed / layout.receipt(2))
    shutil.copy(other / layout.rows(2), sealed / layout.rows(2))
    problem = verify(DirectoryStorage(sealed)).problems[0]
    assert problem.shard == 2
    assert "belongs to the cache of plan" in problem.found


def test_files_without_a_receipt_are_noted_and_taken_up_again(tmp_path, plan):
    writer = CacheWriter.open(tmp_path, plan)
    receipt = writer.write(0, records_of(plan, 0))
    writer.storage.delete(layout.receipt(0))
    (note,) = verify(writer.storage).notes
    assert note.startswith("rows/000/000000.arrow has no receipt: its shard was not finished")
    assert CacheWriter.open(tmp_path, plan).missing() == [0, 1, 2, 3]
    assert CacheWriter.open(tmp_path, plan).write(0, records_of(plan, 0)) == receipt


def test_a_receipt_without_its_file_stops_the_writer(sealed, plan):
    (sealed / layout.rows(1)).unlink()
    with pytest.raises(CacheError, match=r"rows/000/000001.arrow: is missing.*cache repair"):
        CacheWriter.open(sealed, plan).missing()


@pytest.fixture(scope="module")
def drawing_plan():
    return make_plan(tail_draws=3)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("draw_ids", lambda a: np.full_like(a, 3), "draw ids are repeated"),
        ("draw_ids", lambda a: a + 990, "outside the vocabulary"),
        ("draw_counts", lambda a: a * 0, "not those of 3 draws"),
        ("draw_counts", lambda a: a + 1, "not those of 3 draws"),
        ("draw_ids", lambda a: np.full_like(a, -1), "not those of 3 draws"),
        ("topk_ids", lambda a: np.full_like(a, 3), "repeated"),
        ("topk_ids", lambda a: a + 990, "outside the vocabulary"),
        ("topk_logprobs", lambda a: a[:, ::-1], "not falling"),
        ("topk_logprobs", lambda a: a - 1, "sum to"),
        ("entropy", lambda a: a * np.nan, "NaN"),
    ],
)
def test_records_that_make_no_sense_are_refused(drawing_plan, name, change, message):
    record = make_record(drawing_plan, 3)
    check_record(record, drawing_plan)
    record.signals[name] = change(record.signals[name])
    with pytest.raises(ShardCorrupt, match=message):
        check_record(record, drawing_plan)


def test_a_draw_of_a_listed_id_is_refused(drawing_plan):
    record = make_record(drawing_plan, 3)
    record.signals["draw_ids"][:, 0] = record.signals["topk_ids"][:, -1]
    with pytest.raises(ShardCorrupt, match="a draw is one of the top-k ids"):
        check_record(record, drawing_plan)


@pytest.mark.parametrize("profile", ["small", "strict"])
def test_what_rounding_costs_is_measured_again(tmp_path, monkeypatch, profile):
    rounded = DirectoryStorage(write_cache(tmp_path / "cache", make_plan(profile=profile)))
    report = verify(rounded)
    assert report.problems == []
    assert report.rounding is not None
    assert 0 < report.rounding <= 1.1e-4
    monkeypatch.setattr(Lists, "rounding", lambda lists: np.full(len(lists.ids), 4e-4))
    (problem,) = verify(rounded).problems
    assert "rounding cost 0.0004 nats per row" in problem.found
