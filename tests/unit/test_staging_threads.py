"""Threads of one process stage files at the same time without taking each other's folder away."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stillroom.pipeline.cache.storage.directory import DirectoryStorage


def test_many_threads_stage_and_leave_at_once(tmp_path):
    storage = DirectoryStorage(tmp_path / "cache")

    def publish(number: int) -> bool:
        return storage.create(f"receipts/{number}.json", b"%d" % number)

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(publish, range(200)))
    assert all(made)
    assert all(storage.read(f"receipts/{number}.json") == b"%d" % number for number in range(200))


def test_a_folder_taken_away_while_it_is_entered_is_made_again(tmp_path, monkeypatch):
    real, refused = os.mkdir, []

    def mkdir(path, mode=0o777):
        if Path(path).parent.name == "tmp" and len(refused) < 2:
            refused.append(path)
            raise FileNotFoundError(path)
        real(path, mode)

    storage = DirectoryStorage(tmp_path / "cache")
    monkeypatch.setattr(os, "mkdir", mkdir)
    assert storage.create("receipts/0.json", b"0")
    assert len(refused) == 2
    assert storage.read("receipts/0.json") == b"0"
