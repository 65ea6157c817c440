"""The pages as somebody follows them: their commands in their order, in an empty directory.

One idea: what a page leaves to the reader (the teacher, the data) is small here, and the rest is
the page's own text. Captures run by the reference engine, so that no vLLM is started; nothing else
is added. Python is run too, all of a page in one namespace. Blocks that are marked otherwise say in
which test they run, or why they do not.
"""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillroom.stages import __main__ as shell
from tests.tiny_models import save_llama

ROOT = Path(__file__).resolve().parents[2]
MARK = "<!-- runs in a scratch directory, with a tiny teacher -->\n"
BLOCK = re.compile(MARK + r"```(sh|bash|python)\n(.*?)```", re.S)
CHATS = [
    [
        {"role": "user", "content": f"What comes after {n}, and what before?"},
        {"role": "assistant", "content": f"After {n} comes {n + 1}. Before it " + "came, " * n},
    ]
    for n in range(1, 41)
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A directory with forty chats, and a teacher of twelve blocks."""
    root = tmp_path_factory.mktemp("reader")
    (root / "data").mkdir()
    rows = "".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS)
    for name in ("my.jsonl", "data/chats.jsonl"):
        (root / name).write_text(rows)
    save_llama(root / "teacher", num_layers=12, max_position_embeddings=4096)
    return root


@pytest.fixture
def follow(world, monkeypatch, capsys):
    """Runs what a page says, given the names that it leaves to its reader: page -> what its
    commands printed."""
    monkeypatch.chdir(world)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def run(page: str, names: dict[str, Any] | None = None) -> str:
        blocks = BLOCK.findall((ROOT / page).read_text())
        for language, text in blocks:
            if language == "python":
                exec(text, names)
            else:
                _typed(text.splitlines(), capsys)
        assert blocks
        return capsys.readouterr().out

    return run


def _typed(lines: list[str], capsys) -> None:
    for line in lines:
        words = shlex.split(line.replace("OWNER/TEACHER-7B", "teacher"), comments=True)
        assert words[0] == "stillroom"
        if words[1] == "capture" or words[1:3] == ["cache", "plan"]:
            words += ["--engine", "reference"]
        assert shell.run(words[1:]) == 0, (line, capsys.readouterr().err)


def test_from_a_teacher_to_a_student(world, follow):
    said = follow("runbooks/92-from-7b-to-1b.md")
    receipt = json.loads((world / "runs/my/student/student.json").read_text())
    assert receipt
    first = json.loads((world / "runs/my/student-initial/student.json").read_text())["student"]
    assert first["leave_out"] == 8
    assert len(first["keep_layers"]) == 4
    printed = json.loads(re.findall(r"keep_layers = (\[.*?\])", said)[0])
    assert printed == first["keep_layers"]  # on the same text
    assert "> What is it about?" in said
    assert (world / "my.planned.toml").is_file()


def test_a_cache_from_python_and_for_others(world, follow):
    (world / "runs/demo").symlink_to("my")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    names: dict = {}
    exec(code, names)
    record, cache = names["record"], names["cache"]
    assert record.signals["topk_ids"].shape == record.signals["topk_logprobs"].shape
    assert len(cache) > 20
    follow("runbooks/82-other-peoples-files.md")
    assert list((world / "demo-parquet").rglob("*.parquet"))


def test_your_own_data(world, follow):
    page = (ROOT / "runbooks/20-your-own-data.md").read_text()
    table = re.findall(r"```toml\n(.*?)```", page, re.S)[0].replace("Qwen/Qwen3-0.6B", "teacher")
    (world / "run.toml").write_text(f'name = "mine"\ndirectory = "runs/mine"\n\n{table}')
    assert "Before it" in follow("runbooks/20-your-own-data.md")


PLAIN = """
name = "plain"
directory = "runs/plain"
[teacher]
model = "teacher"
[prepare]
window = 96
heldout = 0.2
[[prepare.source]]
name = "chats"
path = "my.jsonl"
[capture]
k = 8
profile = "portable"
hidden_layers = [12, "final"]
hidden_codec = "bf16"
"""


@pytest.fixture(scope="module")
def caches(world):
    """Name -> what pages 42, 80 and 81 leave to their reader: caches of both splits, a student."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        (world / "plain.toml").write_text(PLAIN)
        capture = ["capture", "plain.toml", "--engine", "reference"]
        assert shell.run(["prepare", "plain.toml"]) == 0
        assert shell.run(capture) == 0
        assert shell.run([*capture, "--split", "heldout", "--cache", "runs/plain/held-out"]) == 0
        (world / "cache").symlink_to("runs/plain/cache")
    save_llama(world / "student", num_layers=2, max_position_embeddings=4096)
    return {"cache": "cache", "held_out": "runs/plain/held-out", "student": "student"}


def test_a_cache_by_other_tools(caches, follow):
    names: dict[str, Any] = {}
    follow("runbooks/42-a-cache-without-stillroom.md", names)
    ids, states = names["rows"]["topk_ids"], names["states"]
    assert len(ids[0][0]) == 8
    assert states.shape[0] >= len(ids)  # the rows are of one shard
    assert np.isfinite(names["bf16"](states[0])).all()


def test_the_loss_by_itself(follow):
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    follow("runbooks/60-the-loss-by-itself.md", names)
    assert names["hidden"].grad.abs().sum() > 0


def test_a_loop_of_ones_own(caches, follow):
    torch.manual_seed(0)
    names: dict[str, Any] = dict(caches)
    follow("runbooks/80-a-loop-of-your-own.md", names)
    assert np.mean(names["losses"][-3:]) < np.mean(names["losses"][:3])
    assert names["rest"]


def test_trainers(world, caches, follow):
    pytest.importorskip("trl")
    follow("runbooks/81-trainers.md", dict(caches))
    assert (world / "runs/sft/model.safetensors").is_file()
