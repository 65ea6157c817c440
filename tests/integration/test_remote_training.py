"""`stillroom train` from a web server and from S3: the same student as from a disk, and the second
run reads the local copy."""

import itertools
import json

import pytest
import s3fs

from stillroom.pipeline.training.metrics import read_metrics
from stillroom.stages.__main__ import run
from tests import memory_cache, run_texts
from tests.services import ACCESS_KEY, SECRET_KEY, Proxy, rclone


@pytest.fixture(scope="module")
def share(tmp_path_factory, tiny_llama):
    """A directory whose folder `bucket/cache` is a sealed cache."""
    root = tmp_path_factory.mktemp("share")
    captured = memory_cache.captured(
        tiny_llama, memory_cache.examples(20), hidden_layers=("final",)
    )
    captured.write(root / "bucket" / "cache")
    return root


def trained(directory, teacher, cache, **more) -> list[float]:
    """Losses of `stillroom train`."""
    directory.mkdir()
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in more.items())
    file = directory / "run.toml"
    names = {"directory": directory, "teacher": teacher, "cache": cache}
    file.write_text(run_texts.TRAIN.format(**names, steps=6, more=lines))
    assert run(["train", str(file)]) == 0
    return [line["loss"] for line in read_metrics(directory)]


@pytest.fixture(params=["http", "s3"])
def far(request, share, monkeypatch):
    """(URL of the cache, the proxy that counts its requests)."""
    options = ["--auth-key", f"{ACCESS_KEY},{SECRET_KEY}"] if request.param == "s3" else []
    with rclone(request.param, share, *options) as server, Proxy(server) as proxy:
        if request.param == "s3":
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{proxy.address}")
            # It would keep the endpoint of the test before.
            s3fs.S3FileSystem.clear_instance_cache()
            yield "s3://bucket/cache", proxy
        else:
            yield f"http://{proxy.address}/bucket/cache", proxy


def test_training_from_afar_is_training_from_disk(far, share, tiny_llama, tmp_path):
    url, proxy = far
    near = trained(tmp_path / "near", tiny_llama, share / "bucket" / "cache")
    copy = {"local_copy": str(tmp_path / "copy"), "local_copy_gigabytes": 0.001}
    assert trained(tmp_path / "far", tiny_llama, url, **copy) == near
    assert any("rows/" in line for line in proxy.requests)
    proxy.requests.clear()
    assert trained(tmp_path / "again", tiny_llama, url, **copy) == near
    asked = [line for line in proxy.requests if "rows/" in line or "receipts/" in line]
    assert asked == []
    assert sum(file.stat().st_size for file in (tmp_path / "copy").iterdir()) <= 1e6


def test_a_broken_connection_does_not_change_what_is_learned(far, share, tiny_llama, tmp_path):
    url, proxy = far
    near = trained(tmp_path / "near", tiny_llama, share / "bucket" / "cache")
    faults = itertools.cycle(["reset", None, "truncate", None, "unavailable", None])
    proxy.fault = lambda count, method, path: next(faults) if "rows/" in path else None
    assert trained(tmp_path / "far", tiny_llama, url) == near
