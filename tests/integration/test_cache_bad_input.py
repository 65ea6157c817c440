"""Every kind of bad input a cache can be, given to the command: one message, one exit code, no
traceback, and nothing that was right is lost."""

import errno
import os
import shutil

import fsspec.config
import pytest

from stillroom.cache_schemas import canonical, layout
from stillroom.pipeline.cache.care.verification import verify
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.cache.storage.disk import Disk
from stillroom.stages.__main__ import run
from tests.cache_trials import contents
from tests.services import ACCESS_KEY, SECRET_KEY, rclone, s3_options
from tests.synthetic_records import make_plan, write_cache


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("original") / "cache"
    return write_cache(root, make_plan(profile="small", hidden_layers=[2]))


@pytest.fixture
def cache(original, tmp_path):
    return shutil.copytree(original, tmp_path / "cache")


def stillroom(capfd, *arguments):
    """Exit code and stderr in one line."""
    code = run(["cache", *(str(argument) for argument in arguments)])
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.err.replace("\n", " ")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-9])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def newer(path):
    body = canonical.check(path.read_bytes(), "manifest")
    path.write_bytes(canonical.sign(body | {"format_version": 2}))


def swap_shards(cache, *names):
    plan = make_plan(profile="small", hidden_layers=[2], seed=1)
    other = write_cache(cache.parent / "other", plan, seed=1)
    for name in names:
        shutil.copy(other / name, cache / name)


def swap_table(cache):
    table = min((cache / "tables").iterdir())
    data = bytearray(table.read_bytes())
    data[-1] ^= 1
    table.write_bytes(data)


SPOILT = {
    "no cache": (lambda c: shutil.rmtree(c), 2, "there is no cache here"),
    "truncated rows": (lambda c: truncate(c / layout.rows(1)), 2, "bytes as the receipt says"),
    "truncated dense": (
        lambda c: truncate(c / layout.dense_shard("hidden.2", 1)),
        2,
        "bytes as the receipt says",
    ),
    "truncated manifest": (lambda c: truncate(c / layout.MANIFEST), 2, "is not JSON"),
    "changed manifest": (lambda c: flip(c / layout.MANIFEST), 2, "manifest.json"),
    "newer manifest": (lambda c: newer(c / layout.MANIFEST), 2, "Update stillroom"),
    "swapped rows": (lambda c: swap_shards(c, layout.rows(1)), 2, "as the receipt says"),
    "swapped rows and receipt": (
        lambda c: swap_shards(c, layout.rows(1), layout.receipt(1)),
        2,
        "belongs to the cache of plan",
    ),
    "wrong table": (swap_table, 2, "table"),
    "missing table": (lambda c: shutil.rmtree(c / "tables"), 2, "the table is missing"),
    "receipt without file": (
        lambda c: (c / layout.rows(1)).unlink(),
        2,
        "000001.arrow: is missing",
    ),
    "file without receipt": (
        lambda c: (c / layout.receipt(1)).unlink(),
        2,
        "000001.json: is missing",
    ),
    "symbolic link": (
        lambda c: (
            shutil.move(c / "rows", c.parent / "rows"),
            (c / "rows").symlink_to(c.parent / "rows"),
        ),
        2,
        "symbolic link",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_cache_gets_one_message(capfd, cache, case):
    spoil, expected, message = SPOILT[case]
    spoil(cache)
    code, err = stillroom(capfd, "verify", cache)
    assert code == expected
    assert message in err


@pytest.mark.parametrize("case", [case for case in SPOILT if case != "no cache"])
def test_repair_of_a_spoilt_cache_loses_no_sound_shard(capfd, cache, case):
    before = {
        name: data for name, data in contents(cache).items() if "000000" in name or "/c/0" in name
    }
    SPOILT[case][0](cache)
    code, _ = stillroom(capfd, "repair", cache)
    assert code in (0, 2, 3)
    after = contents(cache) | (contents(cache / "rows") if (cache / "rows").is_symlink() else {})
    kept = {name: after.get(name, after.get(name.removeprefix("rows/"))) for name in before}
    assert kept == before


@pytest.mark.parametrize("verb", ["show", "verify", "repair"])
@pytest.mark.parametrize("where", ["nowhere", "file"])
def test_what_is_no_cache_is_said_to_be_none(capfd, tmp_path, verb, where):
    (tmp_path / "file").write_text("hello")
    code, err = stillroom(capfd, verb, tmp_path / where)
    assert code == 2
    assert "there is no cache here" in err


def test_a_file_where_the_cache_should_go_is_named(capfd, cache, tmp_path):
    (tmp_path / "file").write_text("hello")
    code, err = stillroom(capfd, "push", cache, tmp_path / "file")
    assert code == 2
    assert "is not a directory" in err


def test_a_full_disk_is_named_and_the_same_command_goes_on(capfd, cache, tmp_path, monkeypatch):
    def full(self, path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    target = tmp_path / "copy"
    with monkeypatch.context() as patched:
        patched.setattr(Disk, "write", full)
        code, err = stillroom(capfd, "push", cache, target)
    assert code == 2
    assert "No space left on device" in err
    assert "Free some space" in err
    assert stillroom(capfd, "push", cache, target)[0] == 0
    assert contents(target) == contents(cache)


def test_a_read_only_disk_is_named(capfd, cache, tmp_path, monkeypatch):
    def read_only(self, source, target):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(target))

    monkeypatch.setattr(Disk, "link", read_only)
    code, err = stillroom(capfd, "push", cache, tmp_path / "copy")
    assert code == 2
    assert "Read-only file system" in err


def test_a_bucket_without_permission_is_named_without_credentials(
    capfd, cache, tmp_path, monkeypatch
):
    (tmp_path / "s3" / "bucket").mkdir(parents=True)
    with rclone("s3", tmp_path / "s3", "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}") as address:
        monkeypatch.setitem(fsspec.config.conf, "s3", s3_options(address, "wrong-secret-key-12"))
        code, err = stillroom(capfd, "push", cache, "s3://bucket/copy")
    assert code == 2
    assert "Check the credentials" in err
    assert ACCESS_KEY not in err
    assert "wrong-secret-key-12" not in err


def test_an_unknown_protocol_is_named(capfd, cache):
    code, err = stillroom(capfd, "push", cache, "gopher://host/cache")
    assert code == 2
    assert "cannot be opened" in err


def test_clocks_do_not_matter(cache, tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 0.0)
    again = write_cache(tmp_path / "again", make_plan(profile="small", hidden_layers=[2]))
    for path in again.rglob("*"):
        os.utime(path, (0, 0))
    assert contents(again) == contents(cache)
    assert verify(TeacherCache.open(again).storage).problems == []


def test_another_tokenizer_is_refused(capfd, cache, tiny_llama):
    code, err = stillroom(capfd, "show", cache, "--tokenizer", tiny_llama)
    assert code == 2
    assert "the one the cache was made with" in err


@pytest.mark.parametrize("number", [-1, 10])
def test_an_example_that_is_not_there_is_named(capfd, cache, number):
    code, err = stillroom(capfd, "show", cache, "--example", number)
    assert code == 2
    assert f"no example {number}" in err


def test_escapes_in_a_strangers_text_are_shown_not_obeyed(capsys, tmp_path):
    plan = make_plan()
    plan.facts["engine"]["name"] = "\x1b[2Jevil\u202etxt"
    root = write_cache(tmp_path, plan)
    assert run(["cache", "show", str(root)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b[2J" not in shown
    assert "\u202e" not in shown
    assert "evil" in shown
