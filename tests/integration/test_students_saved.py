"""The benchmark that asks whether what was trained is saved says so, and keeps its cells."""

import json

import pytest

from benchmarks.students_saved import World, plain_loss, table


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize(
    ("architecture", "made"),
    [
        ("olmo2", "config"),
        ("smollm3", "prune_layers"),
        ("cohere", "prune_width"),
        ("granite", "lora"),
        ("qwen2", "lora_embed"),
        ("gemma2", "lora_head"),
    ],
)
def test_the_exported_student_has_the_loss_of_training(world, architecture, made):
    row = world.cell(architecture, made)
    assert (row["verdict"], row["reason"]) == ("equal", "")
    assert row["difference"] == abs(row["in_training"] - row["reloaded"]) <= 1e-5


def test_a_refusal_has_its_reason(world):
    row = world.cell("mamba", "prune_width")
    assert (row["verdict"], row["difference"]) == ("refused", None)
    assert "cannot be pruned in width" in row["reason"]
    assert "refused (1)" in table([row])


def test_a_cell_is_run_once(world):
    row = world.cell("mamba", "prune_width")
    path = world.cells / "mamba-prune_width.json"
    path.write_text(json.dumps(row | {"reason": "kept"}))
    assert world.cell("mamba", "prune_width")["reason"] == "kept"


def test_a_student_that_was_spoilt_after_training_is_wrong(world, monkeypatch):
    def other(directory):
        return plain_loss(directory) + 1e-4

    monkeypatch.setattr("benchmarks.students_saved.plain_loss", other)
    assert world.cell("llama", "config")["verdict"] == "wrong"
