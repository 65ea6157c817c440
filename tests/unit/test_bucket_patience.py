"""A bucket whose library or server misbehaves: every call ends, and no whole passes for a part."""

import threading

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from stillroom.cache_schemas.errors import CacheError, CacheIncomplete, ShardCorrupt
from stillroom.pipeline.cache.storage import bucket
from stillroom.pipeline.cache.storage.bucket import BucketStorage
from stillroom.pipeline.cache.storage.protocol import MOST_BYTES
from stillroom.stages.__main__ import run


class Lying(MemoryFileSystem):
    """A synchronous file system that hangs, or sends whole files where a part was asked for."""

    protocol = "lying"
    cachable = False
    hung = threading.Event()
    whole_answers = 0

    def cat_file(self, path, start=None, end=None, **kwargs):
        if "hangs" in path:
            self.hung.wait(60)
        if type(self).whole_answers > 0:
            type(self).whole_answers -= 1
            start = end = None
        return super().cat_file(path, start=start, end=end, **kwargs)


@pytest.fixture
def lying(monkeypatch):
    fsspec.register_implementation("lying", Lying, clobber=True)
    monkeypatch.setattr(Lying, "whole_answers", 0)
    storage = BucketStorage("lying://bucket", pause=lambda seconds: None)
    storage.replace("rows/file", b"0123456789")
    storage.replace("rows/hangs", b"0123456789")
    return storage


def test_a_call_that_hangs_has_an_end(lying, monkeypatch):
    monkeypatch.setattr(bucket, "GRACE_SECONDS", 0.05)
    with pytest.raises(CacheIncomplete, match="too little came"):
        lying.read("rows/hangs", 0, 4)
    Lying.hung.set()


def test_a_whole_file_for_a_part_is_asked_again(lying, monkeypatch):
    monkeypatch.setattr(Lying, "whole_answers", 1)
    assert lying.read("rows/file", 2, 3) == b"234"


def test_a_service_without_parts_is_refused(lying, monkeypatch):
    monkeypatch.setattr(Lying, "whole_answers", 100)
    with pytest.raises(CacheError, match="10 bytes came where 3 were asked for") as caught:
        lying.read("rows/file", 2, 3)
    assert caught.value.exit_code == 2
    assert "Copy the cache to a disk" in str(caught.value)


def test_a_document_larger_than_any_is_not_read_whole(lying):
    lying.replace("plan.json", bytes(MOST_BYTES["json"] + 1000))
    with pytest.raises(ShardCorrupt, match="33,554,433 bytes or more"):
        lying.read("plan.json")
    lying.replace("plan.json", b"{}")
    assert lying.read("plan.json") == b"{}"


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("s3://AKIAKEY:SE/CRET@bucket/cache", "AWS_ACCESS_KEY_ID"),
        ("gs://name:secret@bucket/cache", "GOOGLE_APPLICATION_CREDENTIALS"),
    ],
)
def test_credentials_before_a_bucket_are_refused(url, told, capfd):
    assert run(["cache", "show", url]) == 2
    said = capfd.readouterr().err
    assert told in said
    assert "SE/CRET" not in said


def test_an_at_sign_in_a_key_is_no_credential():
    assert BucketStorage("s3://bucket/model@v1/cache").location == "s3://bucket/model@v1/cache"
