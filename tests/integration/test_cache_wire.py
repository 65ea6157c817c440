"""What a web server may answer, and what a copy leaves behind: heals, or one message.

The whole campaign over pull, push and training is `benchmarks.cache_wire`.
"""

import errno
import http.server
import os
import threading
from functools import partial
from pathlib import Path

import pytest

from stillroom.cache_schemas import canonical, layout
from stillroom.cache_schemas.errors import CacheError, CacheIncomplete, FormatTooNew, ShardCorrupt
from stillroom.pipeline.cache.care.overview import overview
from stillroom.pipeline.cache.care.repair import repair
from stillroom.pipeline.cache.care.verification import verify
from stillroom.pipeline.cache.partial import present_signals
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.cache.sharing.copying import copy
from stillroom.pipeline.cache.sharing.rewriting import reshard
from stillroom.pipeline.cache.storage import web
from stillroom.pipeline.cache.storage.directory import DirectoryStorage
from stillroom.pipeline.cache.storage.web import WebStorage
from tests import wire_trials
from tests.cache_trials import contents
from tests.services import Proxy
from tests.synthetic_records import assert_same_record, make_plan, make_record, write_cache
from tests.wire_faults import FAULTS

SOON = ["a_redirect_to_a_file", "another_part", "chunks_cut_off", "more_than_was_asked_for"]
SOON += ["half_a_body_that_says_it_is_all", "one_bit", "a_page", "status 401", "status 404"]


@pytest.fixture(scope="module")
def plan():
    return make_plan(hidden_layers=[2, "final"])


@pytest.fixture(scope="module")
def cache(tmp_path_factory, plan):
    return Path(write_cache(tmp_path_factory.mktemp("cache") / "cache", plan))


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Python's own server, which sends whole files only."""

    def log_message(self, *_):
        """Quiet."""


@pytest.fixture
def plain_server(cache):
    """Address of a server without ranges."""
    made = partial(Quiet, directory=str(cache))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), made)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def proxy(plain_server):
    with Proxy(plain_server) as between, wire_trials.impatient():
        yield between


@pytest.mark.parametrize("when", wire_trials.WHEN)
@pytest.mark.parametrize("name", SOON)
def test_a_pull_heals_or_says_so(proxy, cache, tmp_path, name, when):
    wire_trials.inject(proxy, FAULTS[name], wire_trials.WHEN[when]())
    outcome, told = wire_trials.pulled(proxy, contents(cache), tmp_path)
    if name in SOON[2:7] and when == "the first answer of every file":
        assert outcome == "healed", told


def test_a_server_without_ranges_is_read_in_whole_files(proxy, plan):
    remote = TeacherCache.open(WebStorage(f"http://{proxy.address}"))
    proxy.requests.clear()
    for number in range(len(remote)):
        assert_same_record(remote[number], make_record(plan, number))
    asked = [line.split()[1] for line in proxy.requests]
    assert len(asked) == len(set(asked))  # every file once


def test_of_a_large_file_without_ranges_the_part_is_taken(proxy, plan, monkeypatch):
    monkeypatch.setattr(web, "KEPT_FILE_BYTES", 100)
    remote = TeacherCache.open(WebStorage(f"http://{proxy.address}"))
    assert_same_record(remote[4], make_record(plan, 4))


def test_a_slow_server_is_left(proxy, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(web, "GRACE_SECONDS", 0.2)
    wire_trials.inject(proxy, FAULTS["byte_by_byte"], wire_trials.always())
    with pytest.raises(CacheIncomplete, match="too little came"):
        copy(WebStorage(f"http://{proxy.address}"), DirectoryStorage(tmp_path / "copy"))


def test_a_body_without_end_is_cut_off(proxy, tmp_path, monkeypatch):
    monkeypatch.setattr(web, "most_bytes", lambda name: 1 << 21)
    wire_trials.inject(proxy, FAULTS["chunks_without_end"], wire_trials.always())
    with pytest.raises(ShardCorrupt, match="at most 2,097,152"):
        copy(WebStorage(f"http://{proxy.address}"), DirectoryStorage(tmp_path / "copy"))


def test_a_token_in_the_query_goes_with_every_file(proxy):
    TeacherCache.open(WebStorage(f"http://{proxy.address}/?token=t"))
    assert all("?token=t" in line for line in proxy.requests)


def test_a_local_copy_does_not_keep_what_was_wrong(proxy, plan, tmp_path):
    opened = TeacherCache.open(WebStorage(f"http://{proxy.address}"), tmp_path)
    wire_trials.inject(proxy, FAULTS["zeros"], wire_trials.rows_of_one_shard())
    with pytest.raises(ShardCorrupt, match="does not fit its checksum"):
        opened.read(4)
    proxy.fault = lambda *request: None
    assert_same_record(opened.read(4), make_record(plan, 4))


def test_two_partial_copies_at_once_keep_both_signals(cache, tmp_path):
    target = tmp_path / "copy"
    meet = threading.Barrier(2)

    class Met(DirectoryStorage):
        """Both copies have all files before either says what it holds."""

        def alone(self):
            meet.wait()
            return super().alone()

    def pull(signal):
        copy(DirectoryStorage(cache), Met(target), [signal])

    threads = [threading.Thread(target=pull, args=(f"hidden.{n}",)) for n in (2, "final")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held = present_signals(DirectoryStorage(target))
    assert held is None or sorted(held) == ["hidden.2", "hidden.final"]
    assert not verify(DirectoryStorage(target)).problems
    assert TeacherCache.open(target).form.dense.keys() == {"hidden.2", "hidden.final"}


def test_a_copy_sweeps_what_a_killed_one_left(cache, tmp_path):
    (tmp_path / "copy" / "tmp" / "0123456789abcdef").mkdir(parents=True)
    copy(DirectoryStorage(cache), DirectoryStorage(tmp_path / "copy"))
    assert contents(tmp_path / "copy") == contents(cache)
    assert not (tmp_path / "copy" / "tmp").exists()
    (tmp_path / "copy" / "tmp" / "0123456789abcdef").mkdir(parents=True)
    copy(DirectoryStorage(cache), DirectoryStorage(tmp_path / "copy"))
    assert not (tmp_path / "copy" / "tmp").exists()


@pytest.mark.parametrize("name", [layout.MANIFEST, layout.receipt(1), layout.PLAN])
def test_repair_leaves_a_later_format_alone(cache, tmp_path, name):
    copy(DirectoryStorage(cache), DirectoryStorage(tmp_path / "copy"))
    path = tmp_path / "copy" / name
    body = canonical.check(path.read_bytes(), name)
    (body["facts"] if name == layout.PLAN else body)["format_version"] = 2
    path.write_bytes(canonical.sign(body))
    if name == layout.PLAN:
        (tmp_path / "copy" / layout.MANIFEST).unlink()
    before = contents(tmp_path / "copy")
    with pytest.raises(FormatTooNew):
        repair(DirectoryStorage(tmp_path / "copy"))
    assert contents(tmp_path / "copy") == before


def test_a_disk_that_fails_under_one_file_names_the_shard(cache, monkeypatch):
    pread, failing = os.pread, (cache / layout.rows(2)).stat().st_ino

    def broken(descriptor, *more):
        if os.fstat(descriptor).st_ino == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(descriptor, *more)

    monkeypatch.setattr(os, "pread", broken)
    (problem,) = verify(DirectoryStorage(cache)).problems
    assert (problem.shard, problem.name) == (2, layout.rows(2))
    assert "Input/output error" in problem.found


def test_a_pipe_in_the_place_of_a_file_is_no_file(cache, tmp_path):
    copy(DirectoryStorage(cache), DirectoryStorage(tmp_path / "copy"))
    (tmp_path / "copy" / layout.MANIFEST).unlink()
    os.mkfifo(tmp_path / "copy" / layout.MANIFEST)
    with pytest.raises(ShardCorrupt, match="is no file"):
        TeacherCache.open(tmp_path / "copy")


@pytest.mark.parametrize("per_shard", [11, 1 << 40])
def test_shards_larger_than_the_cache_are_refused(cache, tmp_path, per_shard):
    with pytest.raises(CacheError, match="at most 10, of 10 in all"):
        reshard(TeacherCache.open(cache), tmp_path / "new", per_shard)
    assert not (tmp_path / "new").exists()


def test_a_partial_copy_counts_what_is_there(cache, tmp_path):
    copy(DirectoryStorage(cache), DirectoryStorage(tmp_path / "part"), ["hidden.2"])
    part, whole = (overview(DirectoryStorage(p)) for p in (tmp_path / "part", cache))
    files = contents(tmp_path / "part")
    assert part.num_bytes == sum(
        len(files[name])
        for shard in range(whole.plan.num_shards)
        for name in layout.shard_files(shard, ["hidden.2"])
    )
    assert part.dense == ("hidden.2",)
    assert set(part.bytes_per_token) == {"rows", "hidden.2"}
    assert part.num_bytes < whole.num_bytes
