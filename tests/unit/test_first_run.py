"""A run file for somebody's data: it is valid, what is in it follows from the data, and it runs."""

import json
import tomllib

import pytest

from stillroom.pipeline import config
from stillroom.pipeline.beginning.choices import choose
from stillroom.pipeline.beginning.run_text import wish
from stillroom.pipeline.beginning.sampling import sample
from stillroom.pipeline.config import Teacher
from stillroom.stages.__main__ import run as command
from stillroom.stages.whole_run import commands


@pytest.fixture
def chats(tmp_path, monkeypatch):
    """A file of forty chats, in the working directory."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "messages": [
                {"role": "user", "content": "say it"},
                {"role": "assistant", "content": "so " * n},
            ]
        }
        for n in range(1, 41)
    ]
    (tmp_path / "my chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "my chats.jsonl"


@pytest.mark.parametrize(
    ("student", "init"),
    [
        ("third", "prune_layers"),
        ("half", "prune_layers"),
        ("some/model", "model"),
        ("fresh.json", "config"),
    ],
)
def test_the_file_that_is_written_is_a_run(chats, tiny_llama, tmp_path, student, init, capsys):
    (tmp_path / "fresh.json").write_text("{}")
    arguments = ["init", chats, "--teacher", str(tiny_llama), "--student", student]
    assert command(arguments) == 0
    written = config.load(tmp_path / "my chats.toml")
    assert written.prepare
    assert written.prepare.source[0].path == chats
    assert written.student
    assert written.student.init == init
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == "my chats.toml"
    assert "40 documents" in said.err
    assert bool(written.student.leave_out) == (init == "prune_layers")
    measured = ["student"] if written.student.leave_out else []
    stages = ["prepare", "capture", *measured, "train", "evaluate"]
    assert [c[0] for c in commands(written, "x")] == stages
    for stage in measured:
        assert f"stillroom {stage} my chats.toml" in said.out


def test_a_file_that_is_there_stays(chats, tiny_llama, tmp_path, capsys):
    (tmp_path / "my chats.toml").write_text("mine")
    assert command(["init", chats, "--teacher", str(tiny_llama)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "my chats.toml").read_text() == "mine"


@pytest.mark.parametrize("student", ["quarter", "nowhere.json", "./nowhere"])
def test_a_student_that_is_not_there_is_said_before_anything_is_paid_for(
    chats, tiny_llama, tmp_path, student, capsys
):
    assert command(["init", chats, "--teacher", str(tiny_llama), "--student", student]) == 2
    assert "is not there; expected third, half" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "my chats.toml").exists()


def test_the_window_fits_the_examples_and_the_context(chats, tiny_llama):
    teacher = Teacher(model=str(tiny_llama))
    found = sample(chats, teacher)
    assert found.whole
    assert found.documents == len(found.lengths) == 40
    made = choose(found, teacher, 1 / 3)
    assert made.window >= found.share(0.99)
    assert made.window & (made.window - 1) == 0
    assert made.steps * made.batch_tokens >= 0.9 * found.tokens
    assert made.fits


def test_a_part_of_the_data_is_said_to_be_one(chats, tiny_llama):
    found = sample(chats, Teacher(model=str(tiny_llama)), documents=7)
    assert (found.documents, found.whole) == (7, False)


def test_no_data_is_a_message(tmp_path, tiny_llama, capsys):
    assert command(["init", str(tmp_path / "none.jsonl"), "--teacher", str(tiny_llama)]) == 2
    assert "none.jsonl" in capsys.readouterr().err


def test_a_run_is_the_commands_that_its_tables_ask_for():
    made = {
        "runbooks/demo.toml": ["prepare", "capture", "train", "evaluate"],
        "runbooks/demo-recsys.toml": ["prepare", "capture", "capture", "train", "evaluate"],
    }
    for name, wanted in made.items():
        assert [line[0] for line in commands(config.load(name), name)] == wanted


def test_odd_names_are_quoted_in_toml():
    text = wish('a "b" \\ c', 6).table
    assert tomllib.loads(text)["model"] == 'a "b" \\ c'


@pytest.mark.parametrize(("blocks", "gone"), [(1, 0), (2, 1), (30, 20), (32, 21)])
def test_a_third_of_the_blocks_is_a_number_that_goes(blocks, gone):
    table = tomllib.loads(wish("third", blocks).table)
    assert table["leave_out"] == gone
    assert wish("third", blocks).kept == (blocks - gone) / blocks
