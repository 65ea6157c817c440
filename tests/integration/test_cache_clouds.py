"""Caches on Google Cloud Storage and on the Hugging Face hub, each a stand-in on this machine that
the real client library talks to."""

import os
import shutil
import subprocess
import sys

import datasets
import pytest
from huggingface_hub import DatasetCard
from transformers import AutoTokenizer

from stillroom.cache_schemas.errors import CacheError
from stillroom.pipeline.cache.care.verification import verify
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.cache.sharing.copying import copy
from stillroom.pipeline.cache.storage.bucket import BucketStorage
from stillroom.pipeline.cache.storage.directory import DirectoryStorage
from stillroom.pipeline.cache.writer import CacheWriter
from tests import fake_hub, memory_cache
from tests.services import Proxy, free_port
from tests.synthetic_records import assert_same_record, make_record, records_of


@pytest.fixture(scope="module")
def cache(original):
    return DirectoryStorage(original)


def fill(writer, plan):
    for shard in writer.missing():
        writer.write(shard, records_of(plan, shard))
    writer.seal()


@pytest.fixture
def google(monkeypatch):
    """A bucket called `bucket`; yields the proxy before it."""
    # Asks for credentials, which the stand-in needs none of.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import gcsfs
    from gcp_storage_emulator.server import create_server

    port = free_port()
    server = create_server("127.0.0.1", port, in_memory=True)
    server.start()
    try:
        with Proxy(f"127.0.0.1:{port}") as proxy:
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{proxy.address}")
            gcsfs.GCSFileSystem.clear_instance_cache()
            gcsfs.GCSFileSystem().mkdir("bucket")
            yield proxy
    finally:
        server.stop()


def test_a_cache_goes_to_google_and_comes_back(google, cache, plan, tmp_path):
    bucket = BucketStorage("gs://bucket/cache")
    copy(cache, bucket)
    assert verify(bucket).problems == []
    assert_same_record(TeacherCache.open("gs://bucket/cache")[4], make_record(plan, 4))
    back = DirectoryStorage(tmp_path / "back")
    copy(bucket, back)
    assert {name: back.read(name) for name in ("manifest.json", "plan.json")} == {
        name: cache.read(name) for name in ("manifest.json", "plan.json")
    }
    assert not bucket.create("plan.json", b"another")


def test_writers_at_google_put_only_what_is_not_there(google, plan):
    writer = CacheWriter.open("gs://bucket/direct", plan)
    fill(writer, plan)
    assert verify(writer.storage).problems == []
    uploads = [line for line in google.requests if line.startswith("POST /upload/")]
    conditional = [line for line in uploads if "ifGenerationMatch=0" in line]
    # Three files of four shards, plan, codec, zarr.json and README; then group, index and manifest,
    # which follow from the rest.
    assert (len(conditional), len(uploads)) == (16, 19)


def test_google_survives_faults_on_the_wire(google, cache, plan):
    copy(cache, BucketStorage("gs://bucket/cache"))
    faults = {"reset", "truncate", "unavailable"}
    google.fault = lambda count, method, path: (
        faults.pop() if faults and method == "GET" and "rows" in path else None
    )
    for number in range(len(TeacherCache.open("gs://bucket/cache"))):
        record = TeacherCache.open(BucketStorage("gs://bucket/cache", pause=lambda s: None))[number]
        assert_same_record(record, make_record(plan, number))
    assert faults == set()


def test_a_cache_on_the_hub_is_pulled_and_read_in_place(cache, plan, tmp_path):
    """By the command, in a process of its own: the hub's address is read when it starts."""
    paths = [path for path in cache.root.rglob("*") if path.is_file()]
    files = {str(path.relative_to(cache.root)): path.read_bytes() for path in paths}
    with fake_hub.serve({"owner/cache": {"main": files}}) as address:
        away = ["hf://datasets/owner/cache"]
        shown = stillroom(address, "show", *away, "--rows", "1")
        pulled = stillroom(address, "pull", *away, str(tmp_path / "copy"))
        lost = stillroom(address, "pull", "hf://datasets/owner/none", str(tmp_path / "none"))
    assert (shown.returncode, "example 0 of 10" in shown.stdout) == (0, True), shown.stderr
    assert pulled.returncode == 0, pulled.stderr
    assert (pulled.returncode, verify(DirectoryStorage(tmp_path / "copy")).problems) == (0, [])
    assert_same_record(TeacherCache.open(tmp_path / "copy")[4], make_record(plan, 4))
    assert (lost.returncode, "there is no cache here" in lost.stderr) == (2, True)


def test_a_cache_is_published_on_the_hub(cache, plan, tmp_path):
    """In a data set that was not there; what a push that was cut off has sent is not sent again."""
    repos, place = {}, "hf://datasets/owner/new/run"
    inbox = fake_hub.Inbox(repos)
    inbox.refuse = lambda title: 200 if "shards" in title else 500
    with fake_hub.serve(repos, inbox) as address:
        cut = stillroom(address, "push", str(cache.root), place)
        sent, inbox.large = dict(inbox.large), Refusing(inbox.large)
        unsealed = "run/manifest.json" not in repos["owner/new"]["main"]
        inbox.refuse = lambda title: 200
        pushed = stillroom(address, "push", str(cache.root), place)
        again = stillroom(address, "push", str(cache.root), place)
        pulled = stillroom(address, "pull", place, str(tmp_path / "copy"))
    assert (cut.returncode, unsealed, len(sent)) == (3, True, 4), cut.stderr
    assert (pushed.returncode, again.returncode) == (0, 0), pushed.stderr + again.stderr
    assert inbox.commits[-1] == "Teacher cache: manifest"
    assert pulled.returncode == 0, pulled.stderr
    files = [p for p in cache.root.rglob("*") if p.is_file()]
    for path in files:
        name = path.relative_to(cache.root)
        assert repos["owner/new"]["main"][f"run/{name}"] == path.read_bytes()
    assert len(repos["owner/new"]["main"]) == len(files)
    assert_same_record(TeacherCache.open(tmp_path / "copy")[4], make_record(plan, 4))


def test_what_a_person_sees_of_a_published_cache(tiny_llama, tmp_path):
    """The card passes the hub's checks and keeps its words; the viewer opens on rows to read."""
    made = memory_cache.captured(tiny_llama, memory_cache.examples(6), entropy=True)
    directory = made.write(tmp_path / "cache")
    (directory / "README.md").write_bytes((directory / "README.md").read_bytes() + b"Mine.\n")
    repos, place = {}, "hf://datasets/owner/read"
    told = ["--license", "apache-2.0", "--language", "en", "--source-dataset", "owner/texts"]
    with fake_hub.serve(repos) as address:
        pushed = stillroom(
            address, "push", str(directory), place, *told, "--tokenizer", str(tiny_llama)
        )
        wrong = stillroom(address, "push", str(directory), place, "--language", "English")
    assert pushed.returncode == 0, pushed.stderr
    assert (wrong.returncode, "an ISO 639 code" in wrong.stderr) == (2, True)
    for name, data in repos["owner/read"]["main"].items():
        (tmp_path / "got" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "got" / name).write_bytes(data)
    card = DatasetCard.load(tmp_path / "got" / "README.md")
    assert (card.data.license, card.data.language) == ("apache-2.0", ["en"])
    assert card.data.source_datasets == ["owner/texts"]
    assert "Mine." in card.text
    shown = datasets.load_dataset(str(tmp_path / "got"), cache_dir=str(tmp_path / "kept"))["train"]
    record = made.records[0]
    row, length = shown[0], len(record.example.token_ids)
    assert len(row["tokens"]) == len(row["guesses"]) == len(row["entropy"]) == length
    assert row["entropy"][: record.first_row + 1] == [None] * (record.first_row + 1)
    words = AutoTokenizer.from_pretrained(tiny_llama)
    best = words.decode([int(record.signals["topk_ids"][0, 0])])
    assert row["guesses"][record.first_row + 1].startswith(f"{best!r} ")
    index = datasets.load_dataset(str(tmp_path / "got"), "index", cache_dir=str(tmp_path / "kept"))
    assert index["train"].num_rows == 6
    assert verify(DirectoryStorage(tmp_path / "got")).problems == []


def test_a_second_push_keeps_the_card_of_the_first(cache):
    """And what somebody wrote on it at the hub since; of a folder nothing can be said."""
    repos, place = {}, "hf://datasets/owner/twice"
    with fake_hub.serve(repos) as address:
        first = stillroom(address, "push", str(cache.root), place, "--license", "mit")
        files = repos["owner/twice"]["main"]
        files["README.md"] += b"\nWritten at the hub.\n"
        second = stillroom(address, "push", str(cache.root), place, "--language", "en")
        folder = stillroom(address, "push", str(cache.root), f"{place}/sub", "--license", "mit")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    card = DatasetCard(files["README.md"].decode())
    assert (card.data.license, card.data.language) == ("mit", ["en"])
    assert "Written at the hub." in card.text
    assert folder.returncode == 2
    assert not any(name.startswith("sub/") for name in files)
    assert "no card of a folder ('sub')" in folder.stderr


def test_folders_that_a_hub_does_not_take(monkeypatch, cache):
    from stillroom.pipeline.cache.sharing import hub

    monkeypatch.setattr(hub, "MOST_FILES", 2)
    with pytest.raises(CacheError, match=r"files in one folder.*reshard"):
        hub.push(cache.root, "hf://datasets/owner/many")


class Refusing(dict):
    """Content that is there; more is an error."""

    def __setitem__(self, key, value):
        raise AssertionError(f"{key} was sent again")


def test_a_part_of_a_cache_is_published(cache, tmp_path):
    repos = {"owner/part": {"main": {}}}
    with fake_hub.serve(repos) as address:
        url = "hf://datasets/owner/part"
        pushed = stillroom(address, "push", str(cache.root), url, "--signal", "logits")
        pulled = stillroom(address, "pull", url, str(tmp_path / "copy"))
    assert pushed.returncode == pulled.returncode == 0, pushed.stderr + pulled.stderr
    assert "dense: none" in pushed.stderr
    assert not any(name.endswith("/c/0/0/0") for name in repos["owner/part"]["main"])
    assert verify(DirectoryStorage(tmp_path / "copy")).problems == []


def test_the_hub_says_no(cache, plan, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(cache.root, damaged)
    next(damaged.rglob("*.arrow")).write_bytes(b"nothing")
    repos = {"owner/other": {"main": {"manifest.json": b"{}"}}, "owner/empty": {"main": {}}}
    inbox = fake_hub.Inbox(repos)
    inbox.refuse = lambda title: 403
    with fake_hub.serve(repos, inbox) as address:
        said = {
            where: stillroom(address, "push", str(folder), where)
            for where, folder in {
                "hf://datasets/owner/other": cache.root,
                "hf://datasets/owner/empty": cache.root,
                "hf://datasets/owner/empty/damaged": damaged,
                "hf://datasets/owner": cache.root,
            }.items()
        }
    assert {answer.returncode for answer in said.values()} == {2}
    words = ["another cache lies there", "hf auth login", "does not verify", "OWNER/NAME"]
    for answer, word in zip(said.values(), words, strict=True):
        assert word in answer.stderr, answer.stderr
    assert inbox.commits == []
    assert repos["owner/empty"]["main"] == {}


def stillroom(address, *arguments):
    settings = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "stillroom.stages", "cache", *arguments]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)


def test_listings_of_the_hub_are_asked_for_once_per_folder(cache, plan, monkeypatch):
    """A record is one range request more, not three."""
    paths = [path for path in cache.root.rglob("*") if path.is_file()]
    files = {str(path.relative_to(cache.root)): path.read_bytes() for path in paths}
    hub = fake_hub.serve({"owner/cache": {"main": files}})
    with hub as address, Proxy(address.removeprefix("http://")) as proxy:
        options = {"endpoint": f"http://{proxy.address}", "skip_instance_cache": True}
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        opened = TeacherCache.open(BucketStorage("hf://datasets/owner/cache", options))
        opened.read(0, ["topk_ids"])
        proxy.requests.clear()
        found = opened.read(1, ["topk_ids"]).signals["topk_ids"]
        assert (found == make_record(plan, 1).signals["topk_ids"]).all()
        assert len(proxy.requests) == 1


@pytest.mark.parametrize(
    ("url", "package", "advice"),
    [
        ("gs://bucket/cache", "gcsfs", r"stillroom\[gs\]"),
        ("s3://bucket/cache", "s3fs", r"stillroom\[s3\]"),
        ("nowhere://cache", "", "Check the URL"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, url, package, advice):
    if package:
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(
            sys.modules["fsspec.registry"]._registry, url.split(":")[0], raising=False
        )
    with pytest.raises(CacheError, match=advice):
        TeacherCache.open(url)
