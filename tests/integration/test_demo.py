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

KEYS = [
    "kl_before",
    "kl_after",
    "kl_control",
    "top1_after",
    "ppl_teacher",
    "ppl_student",
    "ppl_control",
    "bytes_per_token",
    "tokens_captured",
    "seconds",
]


@pytest.fixture
def files(tmp_path, tiny_llama):
    def write(steps: int = 8) -> list[str]:
        label = f'control = "{tmp_path}/control/student"'
        values = {"root": tmp_path, "teacher": tiny_llama, "steps": steps}
        for name, objective in (("distilled", "forward_kl"), ("control", "cross_entropy")):
            control = label if name == "distilled" else ""
            text = RUN.format(name=name, objective=objective, control=control, **values)
            (tmp_path / f"{name}.toml").write_text(text)
        run, other = tmp_path / "distilled.toml", tmp_path / "control.toml"
        return ["demo", str(run), "--control", str(other), "--engine", "reference"]

    return write


@pytest.mark.slow
def test_the_second_run_only_shows_the_results(files, tmp_path, capfd):
    command = files()
    assert shell.run(command) == 0, capfd.readouterr().err[-3000:]
    shown = capfd.readouterr()
    assert shown.err.count("$ stillroom ") == 5
    results = json.loads((tmp_path / "distilled" / "results.json").read_text())
    assert list(results) == KEYS
    assert list(results["seconds"]) == ["install", "prepare", "capture", "train", "evaluate"]
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
