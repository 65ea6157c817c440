"""The command line: one message and an exit code for every failure, and a light start."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from stillroom.cache_schemas.errors import CacheIncomplete, CorpusError
from stillroom.stages import __main__ as shell
from stillroom.stages import console

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def failing(monkeypatch):
    """A command that raises what it is given, in place of the real ones."""

    def make(error: BaseException):
        app = typer.Typer(pretty_exceptions_enable=False)
        app.callback()(shell.options)

        @app.command()
        def fail() -> None:
            raise error

        monkeypatch.setattr(shell, "app", app)
        return lambda *more: shell.run(["fail"], *more)

    return make


def test_start_imports_nothing_heavy():
    heavy = (
        "{'torch', 'transformers', 'vllm', 'pyarrow', 'zarr', 'numba', 'matplotlib', 'pydantic'}"
    )
    code = f"import sys, stillroom.stages.__main__; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


MISTAKES = [
    *[[stage, "nowhere.toml"] for stage in ("prepare", "generate", "capture", "student", "train")],
    *[[stage, "nowhere.toml"] for stage in ("evaluate", "run", "config", "doctor", "demo")],
    ["train", "nowhere.toml", "--sweep"],
    ["ask", "nowhere.toml", "Who?"],
    ["recommend", "nowhere.toml", "--user", "7"],
    ["corpus", "show", "nowhere.toml"],
    ["cache", "plan", "nowhere.toml"],
    *[["cache", verb, "nowhere"] for verb in ("show", "ls", "verify")],
    *[[stage, "misspelt.toml"] for stage in ("prepare", "capture", "train", "evaluate", "config")],
    *[[stage, "run.toml"] for stage in ("prepare", "generate", "evaluate")],
    ["ask", "run.toml", "Who?"],
    ["capture", "run.toml", "--rank", "3"],
    ["capture", "run.toml", "--fast"],
    ["init", "nowhere.jsonl", "--teacher", "./nowhere"],
    ["init", "here.jsonl", "--teacher", "./nowhere"],
    ["init", "here.jsonl", "--teacher", "./nowhere", "--student", "quarter"],
]
"""Command lines that no model is needed to refuse."""

RUN = """
name = "mine"
directory = "mine"
[teacher]
model = "./nowhere"
[prepare]
[[prepare.source]]
name = "mine"
path = "nowhere.jsonl"
[train]
steps = 1
[[objective]]
name = "forward_kl"
"""

REFUSE = """
import json, sys
from stillroom.stages import __main__ as shell
for line in json.loads(sys.argv[1]):
    code = shell.run(line)
    heavy = sorted({'torch', 'transformers', 'vllm', 'matplotlib', 'ray'} & set(sys.modules))
    print(json.dumps([line, code, heavy]))
"""


def test_a_mistake_that_needs_no_model_is_refused_without_one(tmp_path):
    (tmp_path / "run.toml").write_text(RUN)
    (tmp_path / "misspelt.toml").write_text(RUN.replace("steps", "stebs"))
    (tmp_path / "here.jsonl").write_text('{"text": "here"}\n')
    command = [sys.executable, "-c", REFUSE, json.dumps(MISTAKES)]
    where = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    done = subprocess.run(command, capture_output=True, text=True, check=True, **where)
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        [line, 2, []] for line in MISTAKES
    ]


def test_an_expected_error_is_one_message_and_its_code(failing, capsys):
    error = CorpusError("is empty", where="a.txt", expected="text", remedy="Fill it.")
    assert failing(error)() == 2
    assert capsys.readouterr() == ("", "error: a.txt: is empty; expected text. Fill it.\n")


def test_debug_shows_where_an_error_came_from(failing, capsys):
    assert failing(CorpusError("is empty"))(True) == 2
    assert "Traceback" in capsys.readouterr().err


def test_unfinished_work_says_how_to_go_on(failing, capsys):
    assert failing(CacheIncomplete("3 of 5 shards are missing"))() == 3
    assert "Run again to go on: stillroom fail" in capsys.readouterr().err


def test_an_interrupt_is_incomplete_not_wrong(failing, capsys):
    assert failing(KeyboardInterrupt())() == 3
    assert "Run again to go on: stillroom fail" in capsys.readouterr().err


@pytest.mark.parametrize("line", [["init", "x.jsonl"], ["prepare", "x.toml"], ["cache", "ls", "x"]])
def test_a_command_that_keeps_nothing_does_not_say_so_when_interrupted(line, capsys, monkeypatch):
    def app(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(shell, "app", app)
    assert shell.run(line) == 3
    said = f"interrupted; nothing was changed. Run again: stillroom {' '.join(line)}\n"
    assert capsys.readouterr().err == said
    assert shell.run(["capture", "x.toml"]) == 3
    assert "finished work is kept. Run again to go on" in capsys.readouterr().err


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_the_machines_failures_are_told_in_words(code, failing, capsys):
    assert failing(OSError(code, "text of the system", "/data/x"))() == 2
    written = capsys.readouterr().err
    assert written.startswith("error: /data/x: ")
    assert shell.SURROUNDINGS[code] in written
    assert "Traceback" not in written


def test_no_space_is_seen_through_libraries_that_hide_it(failing, capsys):
    outer = RuntimeError("writing failed")
    outer.__cause__ = ValueError("I/O error: No space left on device (os error 28)")
    assert failing(outer)() == 2
    assert "finished work is kept" in capsys.readouterr().err


def test_a_programming_error_keeps_its_traceback(failing):
    with pytest.raises(ZeroDivisionError):
        failing(ZeroDivisionError())()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare"], "Missing argument"),
        (["prepair"], "No such command 'prepair'"),
        (["prepare", "x.toml", "--fast"], "No such option"),
        (["prepare", "nowhere.toml"], "nowhere.toml: no such file"),
    ],
)
def test_wrong_command_lines_are_refused(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert shell.run(arguments) == 2
    written = capsys.readouterr().err
    assert message in written
    assert len(written.splitlines()) <= 2


def test_a_terminated_process_is_incomplete_and_safe(tmp_path):
    (tmp_path / "pipe").mkdir()
    code = (
        "import os, sys, typer; from stillroom.stages import __main__ as shell;"
        "app = typer.Typer(); app.callback()(shell.options);"
        "app.command()(lambda: (print('ready', flush=True), sys.stdin.read()));"
        "shell.app = app; shell.main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "<lambda>"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, written = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "finished work is kept" in written


def test_lines_come_now_and_then_and_at_the_end(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with console.progress("capture", "tokens") as report:
        for step in range(101):
            now[0] = step * 1.0
            report(step * 10, 1000, tok_per_s=1234.5)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 100 // int(console.SECONDS_BETWEEN_LINES)
    assert lines[0] == "capture: 100/1,000 tokens  10 s, about 90 s left  tok/s 1,234"
    assert re.match(r"capture: 1,000/1,000 tokens  100 s", lines[-1])


@pytest.mark.parametrize(
    ("value", "text"), [(0.123456, "0.1235"), (3.0, "3"), (15321.2, "15,321"), ("bf16", "bf16")]
)
def test_numbers_are_short(value, text):
    assert console.short(value) == text


def test_help_says_the_names_of_tables(capsys):
    assert shell.run(["cache", "audit", "--help"]) == 0
    assert "Run with the [teacher]." in capsys.readouterr().out


def test_completion_can_be_installed(capsys):
    assert shell.run(["--help"]) == 0
    assert "--install-completion" in capsys.readouterr().out


PRINT_TABLES = "init prepare capture train student evaluate recommend doctor demo ask"
PRINT_TABLES_BELOW = {"cache": "show ls diff audit plan", "corpus": "show"}


def test_every_command_that_prints_a_table_prints_json_too():
    known = typer.main.get_command(shell.app).commands
    commands = [known[name] for name in PRINT_TABLES.split()]
    for group, names in PRINT_TABLES_BELOW.items():
        commands += [known[group].commands[name] for name in names.split()]
    for command in commands:
        assert "--json" in {option for p in command.params for option in p.opts}, command.name


def test_quiet_leaves_results_and_errors(monkeypatch, capsys):
    monkeypatch.setenv(console.QUIET, "1")
    console.say("by the way")
    with console.progress("train", "steps") as report:
        report(1, 1, loss=0.5)
    console.put("result")
    console.warn("error: bad")
    assert capsys.readouterr() == ("result\n", "error: bad\n")


def test_quiet_is_understood_after_the_commands_name(tmp_path):
    code = (
        "import sys; from stillroom.stages import __main__ as shell, console;"
        "shell.app.command('look')(lambda: console.say('hush') or console.put('result'));"
        "sys.argv = ['stillroom', 'look', *sys.argv[1:]]; shell.main()"
    )
    said = []
    for more in ([], ["--quiet"]):
        command = [sys.executable, "-c", code, *more]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        said.append((done.stdout, done.stderr))
    assert said == [("result\n", "hush\n"), ("result\n", "")]


def test_a_run_file_that_is_none(tmp_path, capsys):
    (tmp_path / "a directory.toml").mkdir()
    (tmp_path / "latin.toml").write_bytes('name = "ä"'.encode("latin-1"))
    (tmp_path / "empty.toml").write_text("")
    found = []
    for name in ("a directory", "latin", "empty"):
        assert shell.run(["prepare", str(tmp_path / f"{name}.toml")]) == 2
        found.append(" ".join(capsys.readouterr().err.split()))
    assert "is a directory; expected a TOML file" in found[0]
    assert "byte 8 is not UTF-8. Save the file as UTF-8." in found[1]
    assert "key 'name' is missing" in found[2]


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["cache", "plan", "x.toml", "--budget", "much"], "stillroom cache plan --help"),
        (["ask"], "stillroom ask --help"),
        (["--nothing"], "stillroom --help"),
    ],
)
def test_a_wrong_option_names_the_help_of_its_own_command(words, meant, capsys):
    assert shell.run(words) == 2
    assert f"Try: {meant}" in capsys.readouterr().err


def test_a_path_through_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert shell.run(["cache", "show", str(tmp_path / "file" / "cache")]) == 2
    error = NotADirectoryError(errno.ENOTDIR, "Not a directory", "file/run")
    assert shell.surroundings(error).endswith("A part of this path is a file; choose another.")
    assert "Traceback" not in capsys.readouterr().err


def test_a_directory_without_caches_is_a_word(tmp_path, capsys):
    assert shell.run(["cache", "ls", str(tmp_path)]) == 0
    assert "no cache in" in capsys.readouterr().err
