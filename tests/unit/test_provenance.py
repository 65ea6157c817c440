"""Provenance beside results: what it holds, and that a stage replaces only its own entry."""

import json

from stillroom.pipeline import provenance


def test_a_stage_replaces_only_its_own_entry(tmp_path):
    path = tmp_path / "run.json"
    provenance.record(path, "prepare")
    provenance.record(path, "train", steps=3)
    provenance.record(path, "train", steps=4)
    entries = json.loads(path.read_text())
    assert list(entries) == ["prepare", "train"]
    assert entries["train"]["steps"] == 4
    assert entries["train"]["packages"]["numpy"]
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_a_damaged_file_is_begun_again(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("{")
    provenance.record(path, "prepare")
    assert list(json.loads(path.read_text())) == ["prepare"]


def test_commands_that_are_missing_give_nothing():
    assert provenance._output("no-such-command-here") == ""
    assert provenance._output("false") == ""
