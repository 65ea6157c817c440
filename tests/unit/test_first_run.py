"""A run file for somebody's data: it is valid, what is in it follows from the data, and it runs."""

import json
import math
import re
import tomllib
from pathlib import Path

import pytest

from stillroom.cache_schemas.errors import TeacherError
from stillroom.pipeline import config
from stillroom.pipeline.beginning import trial
from stillroom.pipeline.beginning.choices import choose
from stillroom.pipeline.beginning.run_text import wish
from stillroom.pipeline.beginning.sampling import Sample, sample
from stillroom.pipeline.beginning.trial import BLOCK, Line, Speeds, speeds
from stillroom.pipeline.config import Teacher
from stillroom.pipeline.config.training import Student
from stillroom.pipeline.student.memory import numbers_in
from stillroom.pipeline.student.skeleton import config_source
from stillroom.stages.__main__ import run as command
from stillroom.stages.whole_run import commands

SPEEDS = Speeds(Line(0.01, 0.001), Line(0.04, 0.005), Line(0.2, 0.1))
"""Of a made-up machine: seconds a token, and a step."""


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
    made = choose(found, teacher, 1 / 3, SPEEDS)
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


def of_lengths(*lengths: int) -> Sample:
    """A sample of examples of so many tokens."""
    return Sample(len(lengths), True, tuple(sorted(lengths)), sum(lengths), 1.0, ())


@pytest.mark.parametrize(
    ("lengths", "steps", "epochs"),
    [
        ([74] * 40, 100, 9.6),  # few: smaller steps, and ten epochs at most
        ([10] * 12, 8, 9.5),  # next to nothing
        ([300] * 400, 100, 1.9),  # smaller steps suffice
        ([300] * 4000, 528, 1.0),
    ],
)
def test_few_data_are_not_read_over_and_over(lengths, steps, epochs, tiny_llama):
    made = choose(of_lengths(*lengths), Teacher(model=str(tiny_llama)), 1 / 3, SPEEDS)
    assert (made.steps, round(made.epochs, 1)) == (steps, epochs)


def test_epochs_are_printed_and_many_are_warned_of(chats, tiny_llama, capsys):
    assert command(["init", chats, "--teacher", str(tiny_llama), "--to", "few.toml"]) == 0
    said = capsys.readouterr()
    line = next(one for one in said.out.splitlines() if "stillroom train few.toml" in one)
    epochs = float(line.split(" steps, ")[1].split(" epochs")[0])
    assert 4 < epochs <= 10
    assert f"read them {epochs:.1f} times over" in " ".join(said.err.split())
    assert f"{epochs:.1f} epochs of the data" in Path("few.toml").read_text()
    enough = [json.dumps({"text": f"{n} " + "so it goes on " * 200}) for n in range(300)]
    Path("enough.jsonl").write_text("\n".join(enough))
    assert command(["init", "enough.jsonl", "--teacher", str(tiny_llama)]) == 0
    assert "times over" not in capsys.readouterr().err


def test_one_long_text_sets_no_window_and_is_said_to_be_cut(chats, tiny_llama, capsys):
    texts = [f"{n} so it goes on" for n in range(199)] + ["so it goes on " * 60]
    Path("odd.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    assert command(["init", "odd.jsonl", "--teacher", str(tiny_llama)]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "window: 128 tokens; 0.5% of the examples are longer and are cut" in said
    assert command(["init", chats, "--teacher", str(tiny_llama), "--to", "my.toml"]) == 0
    assert "window:" not in capsys.readouterr().err


def test_a_broken_last_line_is_said_as_prepare_says_it(chats, tiny_llama, capsys):
    whole = Path(chats).read_text()
    Path(chats).write_text(whole + whole.splitlines()[0][:30])
    assert command(["init", chats, "--teacher", str(tiny_llama), "--to", "my.toml"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert command(["prepare", "my.toml"]) == 2
    refused = " ".join(capsys.readouterr().err.split()).split("error: ")[1]
    assert f"{chats}:41: is not JSON" in refused
    told, remedy = refused.split(". Mend it")
    assert f"warning: {told}" in said
    assert 'set [prepare] on_error = "skip"' in remedy
    assert "`stillroom prepare my.toml` stops at rows that cannot be used (1)" in said
    text = Path("my.toml").read_text()
    Path("my.toml").write_text(text.replace("[prepare]", '[prepare]\non_error = "skip"'))
    assert command(["prepare", "my.toml"]) == 0  # what was advised works


@pytest.mark.parametrize("name", ["Instructx", "./nowhere"])
def test_a_teacher_that_is_not_there_is_called_what_the_person_called_it(chats, name, capsys):
    assert command(["init", chats, "--teacher", name]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{name}: no such directory" in said
    assert "Check --teacher." in said
    assert "[teacher]" not in said


def test_a_model_is_called_what_named_it(tiny_llama, tmp_path):
    for student, named in (
        (Student(init="model", model="./nowhere"), "[student] model"),
        (Student(), "[teacher] model"),
    ):
        with pytest.raises(TeacherError, match=f"Check {re.escape(named)}"):
            config_source(student, Teacher(model="./neither"), tmp_path)
    assert Teacher(model="a").named_by("--teacher").model_dump() == Teacher(model="a").model_dump()


def test_asking_before_training_says_what_to_run(chats, tiny_llama, capsys):
    assert command(["init", chats, "--teacher", str(tiny_llama), "--to", "my.toml"]) == 0
    capsys.readouterr()
    assert command(["ask", "my.toml", "Who?"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "this run has no trained student yet" in said
    assert "`stillroom run`" in said
    assert "before" not in said


def test_estimates_are_what_was_tried_times_what_is_done(tiny_llama):
    made = choose(of_lengths(*[100] * 100), Teacher(model=str(tiny_llama)), 2 / 3, SPEEDS, 1)
    step = made.batch_tokens * (0.04 + 2 * 0.005) + 0.2 + 2 * 0.1
    assert made.minutes["train"] == pytest.approx(made.steps * step / 60)
    assert made.minutes["capture"] == pytest.approx(1 + 9000 * 0.013 / 60)
    # Each of three blocks is skipped once: one block on average is left to compute, and the head.
    passes = 3 * (1 + 10) / (3 + 10)
    assert made.minutes["student"] == pytest.approx(passes * 512 * 0.013 / 60)
    assert made.minutes["evaluate"] == pytest.approx(1000 * (0.013 + 2 * 0.012) / 60)


class MadeUpClock:
    """Pieces of work take what it is told, the last time over and over."""

    def __init__(self, *seconds: float):
        self.left, self.now, self.reading = list(seconds), 0.0, False

    def __call__(self) -> float:
        if self.reading:
            self.now += self.left.pop(0)
        self.reading = not self.reading
        return self.now


def test_a_trial_tells_blocks_from_the_rest(tiny_llama):
    numbers = numbers_in(tiny_llama)
    block = sum(count for name, count in numbers.items() if BLOCK.search(name)) / 3
    further = int(min(3, 1 + math.ceil(sum(numbers.values()) / block - 3))) - 1
    # One block, then more: forward, step and update, each thrice, of which the fastest counts.
    one = (512.0, 256.0, 300.0, 1024.0, 2048.0, 1500.0, 3.0, 9.0, 2.0)
    more = (1024.0, 600.0, 512.0, 2048.0, 1536.0, 1800.0, 3.0, 4.0, 5.0)
    found = speeds(Teacher(model=str(tiny_llama)), MadeUpClock(*one, *more))
    assert found.tried
    assert found.forward.of(1) == pytest.approx(1.0)
    assert found.forward.block == pytest.approx(1.0 / further)
    assert found.step.of(1) == pytest.approx(4.0)
    assert found.step.of(1 + further) == pytest.approx(6.0)
    assert found.update.of(1 + further) == pytest.approx(3.0)


def test_what_cannot_be_tried_is_reckoned(tiny_llama, monkeypatch, chats, capsys):
    monkeypatch.setattr(trial, "room_on", lambda _device: 0)
    assert not speeds(Teacher(model=str(tiny_llama))).tried
    assert command(["init", chats, "--teacher", str(tiny_llama)]) == 0
    assert "reckoned, nothing was tried" in capsys.readouterr().out


def likeness(line: str) -> str:
    """A line without its figures and the width of its columns."""
    plain = re.sub(r"under a minute|\d+ min", "N min", line)
    return re.sub(r"[━─]+", "━", re.sub(r" +", " ", re.sub(r"\d[\d,.]*", "N", plain)))


def test_the_transcript_in_the_readme_is_what_is_printed(chats, tiny_llama, capsys):
    Path(chats).rename("my.jsonl")
    assert command(["init", "my.jsonl", "--teacher", str(tiny_llama)]) == 0
    said = capsys.readouterr()
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    (shown,) = re.findall(r"```\n(trying how fast.*?)```", text, re.S)
    printed = [*said.err.splitlines(), *said.out.splitlines()]  # two streams of one terminal
    assert sorted(map(likeness, shown.splitlines())) == sorted(map(likeness, printed))


def test_a_spreadsheet_is_told_what_to_become(chats, tiny_llama, capsys):
    Path("my.csv").write_text("text\nhello there\n")
    assert command(["init", "my.csv", "--teacher", str(tiny_llama)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "my.csv is a spreadsheet" in said
    (call,) = re.findall(r"pandas\.read_csv\(.*?lines=True\)", said)
    import pandas  # what is advised works

    eval(call, {"pandas": pandas})
    assert json.loads(Path("my.jsonl").read_text()) == {"text": "hello there"}


def test_an_empty_file_is_named(tiny_llama, chats, capsys):
    Path("empty.jsonl").write_text("")
    assert command(["init", "empty.jsonl", "--teacher", str(tiny_llama)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "empty.jsonl: no example came out of the sources" in said
    assert "min_tokens" not in said
