"""Text of strangers is shown, and does nothing: no markup, no escape, no link, no broken path."""

import ast
import json
import os
import re
import shutil
import unicodedata
from pathlib import Path

import pytest

from stillroom.cache_schemas import canonical, layout
from stillroom.pipeline.cache.card import card
from stillroom.stages import console
from stillroom.stages.__main__ import run
from tests.synthetic_records import make_plan, write_cache

STAGES = Path(__file__).parents[2] / "stages"
EVIL = "[/INST][bold]x[/b] \x1b[2J\x1b]8;;http://evil\x07\x9b31m\u202etxt [l](http://evil) `|<b>"
HARMLESS = ("[/INST][bold]x[/b]", "[l](http://evil)")
FOLDER = "[/b] [bold]a [red]\x1b[31m\u202eb" + "long" * 30


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A cache whose publisher chose every word in it, in a folder of a nasty name."""
    plan = make_plan(hidden_layers=[2])
    plan.facts["teacher"]["architecture"] = EVIL
    plan.facts["engine"] = {"name": EVIL, EVIL: EVIL}
    plan.facts["tokenizer"]["sha256"] = EVIL
    plan.facts["corpus"]["digest"] = EVIL
    monkeypatch.chdir(tmp_path)
    (tmp_path / FOLDER).mkdir(parents=True)
    return Path(write_cache(tmp_path / FOLDER / "cache", plan)).relative_to(tmp_path)


def acts(text: str) -> list[str]:
    """Characters that a terminal would obey or a person would not see."""
    return sorted({c for c in text if unicodedata.category(c)[0] == "C" and c not in "\n\t"})


def spoil_key(cache: Path) -> None:
    body = canonical.check((cache / layout.MANIFEST).read_bytes(), "")
    body[EVIL] = EVIL
    (cache / layout.MANIFEST).write_bytes(canonical.sign(body))


def spoil_plan_key(cache: Path) -> None:
    body = canonical.check((cache / layout.MANIFEST).read_bytes(), "")
    body["plan"]["signals"]["dense"] = {EVIL: {}}
    (cache / layout.MANIFEST).write_bytes(canonical.sign(body))


VERBS = {
    "show": ["show", "{cache}"],
    "show json": ["show", "{cache}", "--json"],
    "show corpus": ["show", "{cache}", "--corpus", FOLDER],
    "ls": ["ls", "."],
    "verify": ["verify", "{cache}"],
    "repair": ["repair", "{cache}"],
    "push": ["push", "{cache}", FOLDER + "/pushed"],
    "pull": ["pull", "{cache}", FOLDER + "/pulled"],
    "merge": ["merge", FOLDER + "/merged", "{cache}", "{cache}"],
    "subset": ["subset", "{cache}", FOLDER + "/subset", "--examples", "3"],
    "no source": ["subset", "{cache}", FOLDER + "/subset", "--source", EVIL],
    "reshard": ["reshard", "{cache}", FOLDER + "/resharded", "--examples-per-shard", "5"],
    "diff": ["diff", "{cache}", "{cache}"],
    "no signal": ["pull", "{cache}", FOLDER + "/x", "--signal", EVIL],
    "no key": ["sign", "{cache}", "--key", EVIL],
    "no verb": [EVIL],
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("spoil", [None, spoil_key, spoil_plan_key])
def test_no_verb_lets_a_stranger_act(evil, capsys, verb, spoil):
    if spoil is not None:
        spoil(evil)
    code = run(["cache", *(word.format(cache=evil) for word in VERBS[verb])])
    written = capsys.readouterr()
    assert code in (0, 2, 3)
    assert acts(written.out + written.err) == []
    assert "Traceback" not in written.err
    if spoil is None and verb == "show":
        assert all(words in written.out for words in HARMLESS)
    if verb == "show json" and spoil is None:
        assert json.loads(written.out)["facts"]["teacher"]["architecture"] == EVIL


@pytest.mark.parametrize("verb", ["push", "pull", "merge", "subset", "reshard"])
def test_a_path_on_stdout_is_one_line_as_it_is(evil, capsys, monkeypatch, verb):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    target = "[bold]x" + "long" * 40 + " [/b] :smile: 1.5 'x' 2026-01-01"
    line = [target if FOLDER in word else word.format(cache=evil) for word in VERBS[verb]]
    assert run(["cache", *line]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    assert os.path.isdir(target)


def test_a_path_in_a_table_is_whole(evil, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert run(["cache", "ls", "."]) == 0
    written = capsys.readouterr().out
    shown = FOLDER.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    assert f" {shown}/cache " in written


def test_one_cache_that_cannot_be_read_does_not_hide_the_others(evil, capsys, original):
    shutil.copytree(original, "sound")
    (evil / layout.receipt(0)).unlink()
    (Path("odd") / layout.PLAN).mkdir(parents=True)
    assert run(["cache", "ls", "."]) == 0
    written = capsys.readouterr()
    assert "sound" in written.out
    assert "is missing" in written.err
    assert "odd: is no file" in written.err


def test_the_card_of_a_stranger_has_no_links(evil):
    plan = make_plan()
    plan.facts["teacher"]["architecture"] = "![i](http://evil/i.png) <http://evil> www.evil.com `|x"
    text = card(plan).decode()
    row = next(line for line in text.splitlines() if line.startswith("| teacher"))
    assert re.fullmatch(r"\| teacher \| ` [^`]* ` \|", row)
    assert re.sub(r"` [^`]* `", "", text).count("evil") == 0


def test_nothing_but_the_console_writes_to_a_terminal():
    offenders = []
    for path in sorted(STAGES.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            writes = name in ("print", "typer.echo", "typer.secho", "out.print", "err.print")
            writes |= name.endswith(("stdout.write", "stderr.write"))
            if path != Path(console.__file__).resolve() and (writes or "rich" in imports(node)):
                offenders.append(f"{path.relative_to(STAGES)}:{node.lineno}")
    assert offenders == []


def imports(node: ast.AST) -> set[str]:
    """First parts of the modules that a statement imports."""
    named = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    named += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    return {name.split(".")[0] for name in named}
