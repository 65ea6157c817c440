"""The pages: every command block runs or says why not, every quoted message is one of ours, and the
site builds without a warning."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from docs.messages import messages, page
from stillroom.stages import __main__ as shell

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "runbooks").rglob("*.md"))]
BLOCK = re.compile(
    r"(?:^ *<!-- (?P<mark>[^\n]*?) -->\n)?^ *```(?:sh|bash)\n(?P<text>.*?)^ *```$", re.M | re.S
)
MARK = re.compile(
    r"runs(?: in a scratch directory, with a tiny teacher)?|covered: (?P<tests>.+)|not run: .{10,}"
)


def blocks() -> list[tuple[str, str, str]]:
    """(page, mark, commands) of every command block."""
    return [
        (str(path.relative_to(ROOT)), found["mark"] or "", found["text"])
        for path in PAGES
        for found in BLOCK.finditer(path.read_text())
    ]


def test_every_command_block_runs_or_says_why_not():
    unmarked = [(where, text) for where, mark, text in blocks() if not MARK.fullmatch(mark)]
    assert unmarked == []
    assert len(blocks()) > 20


def test_commands_stand_in_blocks_that_are_known_as_such():
    """A block without a language is looked at by nobody."""
    for path in PAGES:
        inside = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", path.read_text(), re.M | re.S)
        for language, text in inside:
            typed = re.search(r"^ *(stillroom|pip|torchrun|make|python -m) ", text, re.M)
            assert language or not typed, (path.name, text)


def test_the_tests_that_cover_a_block_exist_and_name_its_verbs():
    for where, mark, text in blocks():
        named = re.findall(r"tests/\S+\.py|\.ci/run", mark) if mark.startswith("covered") else []
        covering = "".join((ROOT / name).read_text() for name in named)
        for verb in re.findall(r"^stillroom +(?:cache +|corpus +)?([a-z-]+)", text, re.M):
            if named:
                assert verb in covering, (where, verb, named)


@pytest.mark.parametrize(
    "text", [text for _, mark, text in blocks() if mark == "runs"], ids=lambda text: text[:40]
)
def test_blocks_that_run_do(text, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        assert words[0] == "stillroom"
        assert shell.run(words[1:]) == 0, capsys.readouterr().err


def test_every_quoted_message_is_one_of_ours():
    """First column of "What people meet"; `…` stands for what is known only when it happens."""
    text = (ROOT / "runbooks" / "90-when-it-breaks.md").read_text()
    table = text.split("## What people meet")[1].split("## ")[0]
    said = [one.found.casefold() for one in messages()]
    source = [
        path.read_text().casefold()
        for room in ("cache_schemas", "pipeline", "stages")
        for path in (ROOT / room).rglob("*.py")
    ]
    quoted = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
    assert len(quoted) > 8
    for quote in quoted:
        wanted = ".*".join(re.escape(part) for part in quote.casefold().split("…"))
        assert any(re.search(wanted, one) for one in [*said, *source]), quote


def test_messages_are_collected_with_their_remedies():
    found = {(one.error, one.found): one for one in messages()}
    one = found["TeacherError", "vLLM cannot serve this model (<reason>)"]
    assert one.remedy == "`--engine reference` runs whatever transformers can load."
    assert one.code == 2
    assert any(one.code == 3 for one in messages())
    assert len(found) > 250
    assert "| 2 | vLLM cannot serve this model (⟨reason⟩) |" in page()


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text().replace("!!python/name:", "")
    listed = re.findall(r"[\w-]+\.md", str(yaml.safe_load(text)["nav"]))
    numbered = {path.name for path in (ROOT / "runbooks").glob("*.md")}
    assert numbered <= set(listed)
    # The rest lies elsewhere in the repository, or is made; docs/site.py says which.
    moved = dict(re.findall(r'"([\w./-]+)": "([\w-]+\.md)"', (ROOT / "docs/site.py").read_text()))
    assert set(listed) - numbered == {*moved.values(), "messages.md"}
    assert [source for source in moved if not (ROOT / source).is_file()] == []


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    assert "forward_kl" in (tmp_path / "site" / "kernels.html").read_text()
