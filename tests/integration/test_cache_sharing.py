"""Push, pull and direct reading over real S3 and HTTP servers, with faults on the wire."""

import itertools
import shutil
import threading
from pathlib import Path

import pytest

from stillroom.cache_schemas import layout
from stillroom.cache_schemas.errors import CacheError, CacheIncomplete, PlanMismatch, ShardCorrupt
from stillroom.pipeline.cache.card import README
from stillroom.pipeline.cache.care.verification import verify
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.cache.sharing.copying import copy
from stillroom.pipeline.cache.storage.bucket import BucketStorage
from stillroom.pipeline.cache.storage.directory import DirectoryStorage
from stillroom.pipeline.cache.storage.readthrough import ReadThrough
from stillroom.pipeline.cache.storage.web import WebStorage
from stillroom.pipeline.cache.writer import CacheWriter
from tests.cache_trials import contents
from tests.services import ACCESS_KEY, FAULTS, SECRET_KEY, Proxy, rclone, s3_options
from tests.synthetic_records import (
    assert_same_record,
    make_plan,
    make_record,
    records_of,
    write_cache,
)
from tests.wire_faults import FAULTS as FAULTS_OF_THE_WIRE


@pytest.fixture(scope="module")
def plan():
    return make_plan(hidden_layers=[2, "final"])


@pytest.fixture(scope="module")
def cache(tmp_path_factory, plan):
    return DirectoryStorage(write_cache(tmp_path_factory.mktemp("original") / "cache", plan))


@pytest.fixture(scope="module")
def s3_server(tmp_path_factory):
    root = tmp_path_factory.mktemp("s3")
    (root / "bucket").mkdir()
    with rclone("s3", root, "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}") as address:
        yield address


@pytest.fixture(scope="module")
def web_server(cache):
    with rclone("http", cache.root) as address:
        yield address


@pytest.fixture
def proxy(s3_server):
    with Proxy(s3_server) as between:
        yield between


@pytest.fixture
def web_proxy(web_server):
    with Proxy(web_server) as between:
        yield between


@pytest.fixture
def bucket(proxy, request):
    return bucket_behind(proxy, request.node.name)


def bucket_behind(proxy, name):
    return BucketStorage(f"s3://bucket/{name}", s3_options(proxy.address), pause=lambda s: None)


def website(proxy):
    return WebStorage(f"http://{proxy.address}", pause=lambda s: None)


def every(count, fault):
    """A fault on every `count`-th request."""
    return lambda number, method, path: fault if number % count == count - 1 else None


def test_push_then_pull_gives_the_same_files(cache, bucket, tmp_path):
    pushed = copy(cache, bucket)
    pulled = copy(bucket, DirectoryStorage(tmp_path / "copy"))
    assert contents(tmp_path / "copy") == contents(cache.root)
    assert pushed == pulled
    assert copy(bucket, DirectoryStorage(tmp_path / "copy")).files == 0


def test_the_manifest_travels_last(cache, bucket, proxy):
    copy(cache, bucket, threads=1)
    puts = [line.split()[1] for line in proxy.requests if line.startswith("PUT")]
    assert puts[-1].endswith(layout.MANIFEST)
    rows, receipt = (
        puts.index(next(p for p in puts if p.endswith(name(3))))
        for name in (layout.rows, layout.receipt)
    )
    assert rows < receipt


@pytest.mark.parametrize("fault", FAULTS)
def test_pull_survives_faults_on_the_wire(cache, web_proxy, tmp_path, fault):
    web_proxy.fault = every(3, fault)
    copy(website(web_proxy), DirectoryStorage(tmp_path))
    assert contents(tmp_path) == contents(cache.root)


@pytest.mark.parametrize("fault", ["reset", "unavailable"])
def test_push_survives_faults_on_the_wire(cache, plan, bucket, proxy, fault):
    failed: set[str] = set()

    def once(number, method, path):
        if method != "PUT" or path in failed or layout.folder(0) not in path:
            return None
        failed.add(path)
        return fault

    proxy.fault = once
    copy(cache, bucket)
    assert len(failed) > 2 * plan.num_shards
    assert verify(bucket).problems == []


def test_a_pull_that_was_cut_off_goes_on_where_it_stopped(cache, web_proxy, tmp_path):
    web_proxy.fault = lambda number, method, path: "reset" if "000002" in path else None
    target = DirectoryStorage(tmp_path)
    with pytest.raises(CacheIncomplete, match="cannot be read") as caught:
        copy(website(web_proxy), target, threads=1)
    assert caught.value.exit_code == 3
    assert target.size(layout.MANIFEST) is None
    web_proxy.fault = every(1 << 30, "reset")
    web_proxy.requests.clear()
    copy(website(web_proxy), target)
    assert contents(tmp_path) == contents(cache.root)
    assert not any(layout.rows(0) in line for line in web_proxy.requests)


def test_a_source_that_lies_is_refused(cache, tmp_path):
    copy(cache, DirectoryStorage(tmp_path / "bad"))
    path = tmp_path / "bad" / layout.rows(1)
    path.write_bytes(bytes(len(path.read_bytes())))
    with pytest.raises(ShardCorrupt, match="does not have the hash"):
        copy(DirectoryStorage(tmp_path / "bad"), DirectoryStorage(tmp_path / "good"))
    assert not (tmp_path / "good" / layout.MANIFEST).exists()
    assert not (tmp_path / "good" / layout.rows(1)).exists()


def test_another_cache_at_the_target_is_not_touched(cache, tmp_path):
    other = CacheWriter.open(tmp_path, make_plan(num_examples=3))
    other.write(0, records_of(other.plan, 0))
    other.seal()
    before = contents(tmp_path)
    with pytest.raises(PlanMismatch, match="another cache lies there"):
        copy(cache, DirectoryStorage(tmp_path))
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("signals", "dense"), [(["logits"], []), (["hidden.2"], ["hidden.2"]), ([], [])]
)
def test_a_partial_copy_holds_what_was_asked_for(cache, plan, tmp_path, signals, dense):
    copy(cache, DirectoryStorage(tmp_path), signals)
    assert not (tmp_path / layout.DENSE_GROUP).exists()  # it would promise arrays of zeros
    part = TeacherCache.open(tmp_path)
    assert part.signals == (*plan.row_signals, *dense)
    expected = make_record(plan, 5)
    for name in set(plan.dense_signals) - set(dense):
        del expected.signals[name]
    assert_same_record(part[5], expected)
    assert verify(DirectoryStorage(tmp_path)).problems == []
    copy(cache, DirectoryStorage(tmp_path))
    assert contents(tmp_path) == contents(cache.root)
    assert copy(cache, DirectoryStorage(tmp_path), signals).dense == sorted(plan.dense_signals)
    assert contents(tmp_path) == contents(cache.root)


def test_adding_a_signal_to_a_partial_copy_keeps_it_readable_meanwhile(cache, plan, tmp_path):
    copy(cache, DirectoryStorage(tmp_path), ["hidden.2"])

    class Lost(DirectoryStorage):
        def read(self, name, start=0, length=None):
            if "hidden.final/c/2" in name:
                raise CacheIncomplete("the connection is gone")
            return super().read(name, start, length)

    with pytest.raises(CacheIncomplete):
        copy(Lost(cache.root), DirectoryStorage(tmp_path), ["hidden.final"])
    assert TeacherCache.open(tmp_path).signals == (*plan.row_signals, "hidden.2")
    assert verify(DirectoryStorage(tmp_path)).problems == []
    copy(cache, DirectoryStorage(tmp_path), ["hidden.final"])
    assert contents(tmp_path) == contents(cache.root)


def test_a_strangers_readme_stays_where_it_is_and_ones_own_travels(cache, tmp_path):
    """It may tell other tools to load files from anywhere."""
    theirs = Path(shutil.copytree(cache.root, tmp_path / "theirs"))
    (theirs / README).write_text("---\nconfigs: [{config_name: x, data_files: /etc/*}]\n---\n")
    copy(DirectoryStorage(theirs), DirectoryStorage(tmp_path / "pulled"))
    assert contents(tmp_path / "pulled") == contents(cache.root)
    copy(DirectoryStorage(theirs), DirectoryStorage(tmp_path / "pushed"), readme=True)
    assert contents(tmp_path / "pushed") == contents(theirs)
    copy(cache, DirectoryStorage(tmp_path / "pushed"))
    assert contents(tmp_path / "pushed") == contents(theirs)


def test_an_unknown_signal_is_refused(cache, tmp_path):
    with pytest.raises(CacheError, match=r"no signal hidden\.7"):
        copy(cache, DirectoryStorage(tmp_path), ["hidden.7"])


def test_records_are_read_straight_from_a_bucket(cache, plan, bucket):
    copy(cache, bucket)
    remote = TeacherCache.open(bucket)
    for number in range(len(remote)):
        assert_same_record(remote[number], make_record(plan, number))


def test_a_sample_takes_at_most_two_requests(cache, plan, web_proxy):
    remote = TeacherCache.open(website(web_proxy))
    for number, logits in itertools.product(range(len(remote)), [list(plan.row_signals)]):
        web_proxy.requests.clear()
        remote.read(number, logits)
        assert len(web_proxy.requests) <= 2
    web_proxy.requests.clear()
    remote.read(4, plan.row_signals)
    assert len(web_proxy.requests) == 1


def test_opening_takes_a_handful_of_requests(web_proxy):
    TeacherCache.open(website(web_proxy))
    assert len(web_proxy.requests) <= 4


def test_two_writers_of_one_shard_in_a_bucket_leave_one_shard(plan, bucket, proxy):
    proxy.conditional = True
    writers = [CacheWriter.open(bucket_behind(proxy, "twice"), plan) for _ in range(2)]
    receipts = {}

    def work(number):
        receipts[number] = writers[number].write(1, records_of(plan, 1, seed=number))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert receipts[0] == receipts[1]
    for shard in (0, 2, 3):
        writers[0].write(shard, records_of(plan, shard))
    writers[1].seal()
    assert verify(bucket_behind(proxy, "twice")).problems == []


def test_a_bucket_without_permission_says_so_and_shows_no_secret(cache, proxy):
    forbidden = BucketStorage("s3://bucket/no", s3_options(proxy.address, "wrong" * 5))
    with pytest.raises(CacheError, match="Check the credentials") as caught:
        copy(cache, forbidden)
    assert caught.value.exit_code == 2
    assert ACCESS_KEY not in str(caught.value)
    assert "wrong" * 5 not in str(caught.value)


def test_a_bucket_that_is_not_there_is_said_to_be_none(cache, proxy):
    proxy.fault = lambda number, method, path: FAULTS_OF_THE_WIRE["status 404"]
    with pytest.raises(CacheError, match="Make the bucket, or check the URL"):
        copy(cache, bucket_behind(proxy, "nowhere"))


def test_credentials_in_a_url_are_not_shown():
    storage = WebStorage("https://alice:hunter2@127.0.0.1:1/x?X-Amz-Signature=abc", pause=bool)
    with pytest.raises(CacheIncomplete) as caught:
        TeacherCache.open(storage)
    assert "hunter2" not in str(caught.value) + storage.location
    assert "abc" not in str(caught.value) + storage.location


def test_a_read_through_copy_serves_again_without_requests(plan, web_proxy, tmp_path):
    first = TeacherCache.open(website(web_proxy), tmp_path)
    assert_same_record(first[4], make_record(plan, 4))
    web_proxy.requests.clear()
    for path in list(tmp_path.iterdir())[:1]:
        path.write_bytes(b"rotten")
    assert_same_record(TeacherCache.open(website(web_proxy), tmp_path)[4], make_record(plan, 4))
    small = ("partial.json", layout.MANIFEST)
    again = [line for line in web_proxy.requests if not any(name in line for name in small)]
    assert len(again) == 1


def test_a_cache_published_anew_is_not_served_from_the_copy_of_the_old_one(plan, tmp_path):
    root, local = tmp_path / "cache", tmp_path / "local"
    for seed in (0, 1):
        shutil.rmtree(root, ignore_errors=True)
        write_cache(root, plan, seed)
        assert_same_record(TeacherCache.open(root, local)[4], make_record(plan, 4, seed))


def test_a_local_copy_that_cannot_be_made_says_so(cache, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="no place for a local copy"):
        TeacherCache.open(cache, tmp_path / "file")


def test_a_read_through_copy_keeps_to_its_limit(plan, cache, tmp_path):
    kept = ReadThrough(cache, tmp_path, 20_000)
    held = TeacherCache.open(kept)
    for number in [*range(10), *range(10)]:
        assert_same_record(held[number], make_record(plan, number))
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 20_000
