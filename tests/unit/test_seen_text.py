"""`stillroom evaluate` says how much of its text a student was trained on."""

import json
import shutil

import pytest

from stillroom.pipeline.evaluation import seen_text
from stillroom.stages import __main__ as shell
from tests import tiny_models

RUN = """
name = "{name}"
directory = "{root}/{name}"
[teacher]
model = "{teacher}"
[prepare]
window = 64
heldout = {heldout}
[[prepare.source]]
name = "texts"
path = "{root}/{rows}.jsonl"
[evaluate]
split = "{split}"
corpus = "{corpus}"
examples = 4
[evaluate.students]
mine = "{root}/trained/student"
"""


class Runs:
    """Run files in one directory; the student of `trained` lies beside its corpus."""

    def __init__(self, root, teacher):
        self.root, self.teacher = root, teacher
        english = tiny_models.english()
        for name, begin in {"read": 0, "fresh": 60}.items():
            texts = [english[n * 300 :][:300] for n in range(begin, begin + 12)]
            lines = "\n".join(json.dumps({"text": text}) for text in texts)
            (root / f"{name}.jsonl").write_text(lines)
        self.write("trained", "read", heldout=0.4, split="heldout")
        self.run("prepare", "trained")
        shutil.copytree(teacher, root / "trained" / "student")

    def write(self, name, rows, heldout=0.0, split="train", corpus=""):
        values = {"heldout": heldout, "split": split, "corpus": corpus, "teacher": self.teacher}
        text = RUN.format(name=name, rows=rows, root=self.root, **values)
        (self.root / f"{name}.toml").write_text(text)

    def run(self, stage, name):
        assert shell.run([stage, str(self.root / f"{name}.toml")]) == 0

    def seen(self, name) -> dict:
        """What `evaluation.json` says of the one training corpus there is."""
        told = json.loads((self.root / name / "evaluation.json").read_text())["seen_in_training"]
        ((where, found),) = told.items()
        assert where == str((self.root / "trained" / "corpus").resolve())
        return found


@pytest.fixture(scope="module")
def runs(tiny_llama, tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"), tiny_llama)


def test_held_out_text_of_the_run_that_trained_the_student(runs, capsys):
    runs.run("evaluate", "trained")
    written = capsys.readouterr()
    found = runs.seen("trained")
    assert found["examples"] > 0
    assert found["examples_shared"] == 0
    said = f"0 of {found['examples']} examples by half or more"
    assert said in written.err
    assert "held-out text of trained" in written.out


def test_the_training_split_itself_is_warned_of(runs, capsys):
    runs.write("itself", "read", corpus=f"{runs.root}/trained/corpus")
    runs.run("evaluate", "itself")
    written = capsys.readouterr()
    assert runs.seen("itself")["itself"] == 1
    assert "warning: this is the text that a student was trained on" in written.err
    assert f"text of the training split of {runs.root}/trained/corpus" in written.out


def test_of_a_large_training_split_some_examples_are_looked_through(runs, capsys, monkeypatch):
    monkeypatch.setattr(seen_text, "LOOKED_THROUGH", 2)
    runs.run("evaluate", "trained")
    found = runs.seen("trained")
    assert found["looked_through"] == 2 < found["of"]
    said = f"(2 of its {found['of']} examples looked through: at least)"
    assert said in capsys.readouterr().err


def test_another_corpus_is_looked_through_too(runs, capsys):
    for name, rows in {"again": "read", "new": "fresh"}.items():
        runs.write(name, rows)
        runs.run("prepare", name)
        runs.run("evaluate", name)
    again, new = runs.seen("again"), runs.seen("new")
    assert again["itself"] == new["itself"] == 0
    assert again["examples_shared"] > 0
    assert new["examples"] > new["examples_shared"] == 0
    said = " ".join(capsys.readouterr().err.split())
    for found in (again, new):
        assert f"{found['examples_shared']} of {found['examples']} examples by half" in said
