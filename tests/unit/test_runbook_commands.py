"""Runbooks say only what the command line and the run file understand."""

import re
from pathlib import Path

import pytest
import typer

from stillroom.pipeline import config
from stillroom.stages.__main__ import app

RUNBOOKS = Path(__file__).resolve().parents[2] / "runbooks"
PAGES = sorted(p for p in RUNBOOKS.rglob("*") if p.suffix in (".md", ".sh", ".yaml"))


def commands(text: str) -> list[list[str]]:
    """Every `stillroom ...` with its continuation lines, as words."""
    joined = re.sub(r"\\\n\s*|\n\s+(?=--)", " ", text)
    found = re.findall(r"(?:^|`|exec |srun )stillroom +([a-z][^`\n#]*)", joined, re.MULTILINE)
    return [line.split() for line in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_option_exists(page):
    known = typer.main.get_command(app)
    for words in commands(page.read_text()):
        command = known
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        assert command is not known, words
        options = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
        used = {word.split("=")[0] for word in words if word.startswith("--")}
        assert used <= options, (page.name, used - options)


def test_the_cluster_examples_are_among_them():
    texts = [(RUNBOOKS / f"capture-{name}").read_text() for name in ("slurm.sh", "kubernetes.yaml")]
    for text in texts:
        (words,) = commands(text)
        assert {"--rank", "--world-size"} <= set(words)


@pytest.mark.parametrize("file", sorted(RUNBOOKS.glob("*.toml")), ids=lambda file: file.name)
def test_every_run_file_is_understood(file):
    assert config.load(file).directory.startswith("runs/")
