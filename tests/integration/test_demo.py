"""`stillroom demo` on a tiny teacher: all stages, then none of them again."""

import json

import pytest

from stillroom.stages import __main__ as shell

RUN = """
name = "{name}"
directory = "{root}/{name}"
[teacher]
model = "{teacher}"
[prepare]
window = 64
[[prepare.source]]
name = "help"
kind = "pydoc_topics"
limit = 8
[capture]
k = 16
examples_per_shard = 32
[student]
keep_layers = [0, 2]
[[objective]]
name = "{objective}"
[train]
steps = {steps}
batch_tokens = 512
cache = "{root}/distilled/cache"
[evaluate]
examples = 4
students = {{ {control} }}
"""

ELSEWHERE = """
name = "elsewhere"
directory = "{root}/elsewhere"
[teacher]
model = "{teacher}"
[prepare]
window = 32
heldout = 0.0
[[prepare.source]]
name = "other"
kind = "text"
path = "{root}/other.txt"
[evaluate]
split = "train"
[evaluate.students]
before = "{root}/distilled/student-initial"
after = "{root}/distilled/student"
control = "{root}/control/student"
"""

FIGURES = {
    *("kl_before", "kl_after", "kl_control", "top1_before", "top1_after", "top1_control"),
    *("ppl_teacher", "ppl_before", "ppl_student", "ppl_control"),
}
"""Each with its spread."""
KEYS = FIGURES | {"spread", "student_minus_control", "seeds", "bytes_per_token", "tokens_captured"}
KEYS |= {"seconds", "elsewhere", "answers"}
STAGES = ["install", "prepare", "capture", "train", "control", "evaluate", "elsewhere", "answers"]


@pytest.fixture
def files(tmp_path, tiny_llama):
    def write(steps: int = 8) -> list[str]:
        label = f'control = "{tmp_path}/control/student"'
        values = {"root": tmp_path, "teacher": tiny_llama, "steps": steps}
        for name, objective in (("distilled", "forward_kl"), ("control", "cross_entropy")):
            control = label if name == "distilled" else ""
            text = RUN.format(name=name, objective=objective, control=control, **values)
            (tmp_path / f"{name}.toml").write_text(text)
        (tmp_path / "elsewhere.toml").write_text(ELSEWHERE.format(**values))
        (tmp_path / "other.txt").write_text("The sea was calm, and nobody said a word. " * 12)
        run, other = tmp_path / "distilled.toml", tmp_path / "control.toml"
        more = ["--elsewhere", str(tmp_path / "elsewhere.toml"), "--engine", "reference"]
        return ["demo", str(run), "--control", str(other), *more]

    return write


@pytest.mark.slow
def test_the_second_run_only_shows_the_results(files, tmp_path, capfd):
    command = files()
    assert shell.run(command) == 0, capfd.readouterr().err[-3000:]
    shown = capfd.readouterr()
    assert shown.err.count("$ stillroom ") == 8
    results = json.loads((tmp_path / "distilled" / "results.json").read_text())
    assert set(results) == KEYS
    assert list(results["seconds"]) == STAGES
    assert set(results["spread"]) == FIGURES | {"of"}
    assert results["seeds"] == [0]
    assert results["elsewhere"].keys() == FIGURES | {"spread", "student_minus_control"}
    assert set(results["answers"]["answers"]) == {"teacher", "before", "after", "control"}
    assert shown.out.count("control, text only") == 2
    assert "student less control: kl" in shown.out
    assert f"{results['top1_control']:.3f} ± " in shown.out
    assert results["tokens_captured"] > 1000
    assert 0 < results["kl_after"] < results["kl_before"]
    assert min(results["seconds"][stage] for stage in ("prepare", "capture", "train")) > 0
    assert shell.run(command) == 0
    again = capfd.readouterr()
    assert "$ stillroom" not in again.err
    assert again.out in shown.out
    assert json.loads((tmp_path / "distilled" / "results.json").read_text()) == results


def test_a_control_in_the_runs_own_directory_is_refused(files, tmp_path, capsys):
    command = files()
    text = (tmp_path / "control.toml").read_text()
    (tmp_path / "control.toml").write_text(text.replace("/control", "/distilled", 1))
    assert shell.run(command) == 2
    assert "Give the control a directory of its own" in capsys.readouterr().err
