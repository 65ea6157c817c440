"""Writer and reader of a cache: round trip, resume, refusal of another plan, sealing."""

import itertools
from collections.abc import Sequence

import pytest

from stillroom.cache_schemas.errors import CacheError, CacheIncomplete, PlanMismatch
from stillroom.pipeline.cache.card import card
from stillroom.pipeline.cache.care.verification import verify
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.cache.storage.directory import DirectoryStorage
from stillroom.pipeline.cache.writer import CacheWriter
from tests.cache_trials import contents
from tests.synthetic_records import assert_same_record, make_plan, make_record, records_of


def write_all(root, plan, shards=None):
    writer = CacheWriter.open(root, plan)
    for shard in writer.missing() if shards is None else shards:
        writer.write(shard, records_of(plan, shard))
    return writer


@pytest.mark.parametrize("profile", ["exact", "portable"])
def test_what_is_written_is_read(tmp_path, profile):
    plan = make_plan(
        profile=profile, moments=True, tail_draws=3, hidden_layers=[2, "final"], images=True
    )
    write_all(tmp_path / "cache", plan).seal()
    cache = TeacherCache.open(str(tmp_path / "cache"))
    assert len(cache) == 10
    for number in range(len(cache)):
        assert_same_record(cache[number], make_record(plan, number))


def test_a_cache_is_a_sequence_and_says_what_it_is_in_three_lines(tmp_path):
    plan = make_plan(hidden_layers=[2])
    write_all(tmp_path, plan).seal()
    cache = TeacherCache.open(tmp_path)
    part = cache[2:9:3]
    assert isinstance(part, Sequence)
    assert [one.example.example_id for one in part] == [
        cache[number].example.example_id for number in (2, 5, 8)
    ]
    assert_same_record(part[-1:][0], make_record(plan, 8))
    with pytest.raises(IndexError):
        part[3]
    assert len(list(reversed(cache))) == len(list(cache)) == 10
    lines = repr(cache).splitlines()
    assert lines[0] == f"TeacherCache at {tmp_path}"
    assert lines[1].startswith("  10 examples, ")
    assert "hidden.2" in lines[2]
    assert len(lines) == 3
    assert repr(part).startswith("3 examples of TeacherCache")


def test_only_the_signals_asked_for_are_decoded(tmp_path):
    plan = make_plan(hidden_layers=[2])
    write_all(tmp_path, plan).seal()
    record = TeacherCache.open(tmp_path).read(4, signals=["topk_ids"])
    assert set(record.signals) == {"topk_ids"}
    assert record.example == make_record(plan, 4).example
    with pytest.raises(CacheError, match=r"no signal \['hidden.9'\]"):
        TeacherCache.open(tmp_path).read(4, signals=["hidden.9"])


def test_a_second_run_writes_only_what_is_missing_and_gives_the_same_bytes(tmp_path):
    plan = make_plan(hidden_layers=[1])
    write_all(tmp_path / "once", plan).seal()
    write_all(tmp_path / "twice", plan, shards=[2, 0])
    writer = CacheWriter.open(tmp_path / "twice", plan)
    assert writer.missing() == [1, 3]
    with pytest.raises(CacheIncomplete, match="2 of 4 shards are missing, the first is 1"):
        writer.seal()
    write_all(tmp_path / "twice", plan).seal()
    assert contents(tmp_path / "once") == contents(tmp_path / "twice")


def test_shares_of_workers_cover_all_shards_once(tmp_path):
    writer = CacheWriter.open(tmp_path, make_plan(num_examples=50, per_shard=2))
    shares = [writer.missing(rank, 4) for rank in range(4)]
    assert sorted(itertools.chain(*shares)) == list(range(25))


def test_another_plan_is_refused_and_every_difference_is_named(tmp_path):
    write_all(tmp_path, make_plan(), shards=[1])
    other = make_plan(k=16)
    other.facts["corpus"]["digest"] = "9" * 64
    with pytest.raises(PlanMismatch, match=r"capture\.k: found 8, expected 16.*corpus") as caught:
        CacheWriter.open(tmp_path, other)
    assert caught.value.exit_code == 2
    assert "delete" not in caught.value.remedy
    other.facts["corpus"]["split"] = "heldout"
    with pytest.raises(PlanMismatch, match="capture --cache DIRECTORY"):
        CacheWriter.open(tmp_path, other)


@pytest.mark.parametrize("profile", ["small", "portable"])
def test_a_cache_begins_with_what_is_written_first(tmp_path, profile):
    first = CacheWriter.open(tmp_path, make_plan(profile=profile))
    assert (first.missing(), first.needs_fit) == ([0, 1, 2, 3], profile == "small")
    other = CacheWriter.open(tmp_path, make_plan(k=16, profile=profile))
    assert list(tmp_path.iterdir()) == []
    other.begin()
    with pytest.raises(PlanMismatch, match=r"capture\.k: found 16, expected 8.*delete this one"):
        first.begin()
    with pytest.raises(PlanMismatch, match=r"delete this one \(no shard of it is finished\)"):
        CacheWriter.open(tmp_path, make_plan(profile=profile))


def test_a_plan_without_examples_is_refused():
    with pytest.raises(CacheError, match="no example to keep"):
        make_plan(num_examples=0)


def test_a_shard_needs_exactly_its_examples(tmp_path):
    plan = make_plan()
    writer = CacheWriter.open(tmp_path, plan)
    for wrong in ([], records_of(plan, 0)[:2], records_of(plan, 0) + records_of(plan, 1)):
        with pytest.raises(CacheError, match="expected 3"):
            writer.write(0, wrong)
    assert writer.missing() == [0, 1, 2, 3]
    assert not (tmp_path / "tmp").exists()


def test_an_unsealed_cache_is_not_read(tmp_path):
    with pytest.raises(CacheError, match="there is no cache here"):
        TeacherCache.open(tmp_path)
    write_all(tmp_path, make_plan())
    with pytest.raises(CacheIncomplete, match="not sealed"):
        TeacherCache.open(tmp_path)


def test_the_card_points_a_hubs_viewer_at_the_index_and_may_be_edited(tmp_path):
    write_all(tmp_path, make_plan()).seal()
    text = (tmp_path / "README.md").read_text()
    assert "data_files: index/*.parquet" in text
    assert [path.name for path in tmp_path.glob("index/*.parquet")] == ["000.parquet"]
    (tmp_path / "README.md").write_text("mine")
    CacheWriter.open(tmp_path, make_plan()).seal()
    assert (tmp_path / "README.md").read_text() == "mine"
    assert verify(DirectoryStorage(tmp_path)).problems == []


def test_a_card_shows_a_strangers_text_as_text():
    plan = make_plan()
    plan.facts["teacher"]["architecture"] = "<script>alert(1)</script>|`x`\x1b[2J"
    text = card(plan).decode()
    # Inside a code span HTML is text (CommonMark 6.1), and nothing in it ends the span or the cell.
    (row,) = [line for line in text.splitlines() if line.startswith("| teacher |")]
    assert row.startswith("| teacher | ` <script>alert(1)</script>\\|'x'")
    assert row.count("`") == 2
    assert "\x1b" not in text
