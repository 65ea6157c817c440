"""The pages as somebody follows them: their commands in their order, in an empty directory.

One idea: what a page leaves to the reader (the teacher, the data) is small here, and the rest is
the page's own text. Captures run by the reference engine, so that no vLLM is started; nothing else
is added. Blocks that are marked otherwise say in which test they run, or why they do not.
"""

import json
import re
import shlex
from pathlib import Path

import pytest

from stillroom.stages import __main__ as shell
from tests.tiny_models import save_llama

ROOT = Path(__file__).resolve().parents[2]
MARK = "<!-- runs in a scratch directory, with a tiny teacher -->\n"
BLOCK = re.compile(MARK + r"```(?:sh|bash)\n(.*?)```", re.S)
CHATS = [
    [
        {"role": "user", "content": f"What comes after {n}, and what before?"},
        {"role": "assistant", "content": f"After {n} comes {n + 1}. Before it " + "came, " * n},
    ]
    for n in range(1, 41)
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A directory with forty chats, and a teacher of ten blocks."""
    root = tmp_path_factory.mktemp("reader")
    (root / "data").mkdir()
    rows = "".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS)
    for name in ("my.jsonl", "data/chats.jsonl"):
        (root / name).write_text(rows)
    save_llama(root / "teacher", num_layers=10, max_position_embeddings=4096)
    return root


@pytest.fixture
def follow(world, monkeypatch, capsys):
    """Runs what a page says: page -> what its commands printed."""
    monkeypatch.chdir(world)

    def run(page: str) -> str:
        blocks = BLOCK.findall((ROOT / page).read_text())
        lines = [line for block in blocks for line in block.splitlines()]
        for line in lines:
            words = shlex.split(line.replace("OWNER/TEACHER-7B", "teacher"), comments=True)
            assert words[0] == "stillroom"
            if words[1] == "capture" or words[1:3] == ["cache", "plan"]:
                words += ["--engine", "reference"]
            assert shell.run(words[1:]) == 0, (line, capsys.readouterr().err)
        assert lines
        return capsys.readouterr().out

    return run


def test_from_a_teacher_to_a_student(world, follow):
    said = follow("runbooks/92-from-7b-to-1b.md")
    receipt = json.loads((world / "runs/my/student/student.json").read_text())
    assert receipt
    first = json.loads((world / "runs/my/student-initial/student.json").read_text())["student"]
    assert first["leave_out"] == 6
    assert len(first["keep_layers"]) == 4
    printed = json.loads(re.findall(r"keep_layers = (\[.*?\])", said)[0])
    assert len(printed) == 2
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
