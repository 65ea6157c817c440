"""The command for a GPU, without one: what it refuses, what becomes of a section that ends badly,
and every section in miniature."""

import json
import os
import re
import subprocess
import sys

import pytest

from benchmarks.on_a_gpu import __main__ as command
from benchmarks.on_a_gpu import contracts, machine, processes
from benchmarks.on_a_gpu.scale import Scale
from benchmarks.on_a_gpu.sections import SECTIONS, chosen
from stillroom.cache_schemas.errors import ConfigError

ABSENT = (
    *("vllm", "zarr", "transformers", "tokenizers", "numcodecs", "pcodec", "pyarrow", "fsspec"),
    *("numba", "xxhash", "ray", "safetensors", "huggingface_hub", "typer", "rich"),
)
BARE = f"""
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from benchmarks.on_a_gpu import capture, contracts, correctness, speed, training
from benchmarks.on_a_gpu.scale import Scale
from benchmarks.on_a_gpu.sections import SECTIONS
for name in ("one_step", "training_plain"):
    assert SECTIONS[name](Scale(True))["wrong"] == [], name
"""


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], env=os.environ | variables, capture_output=True, text=True
    )


def test_a_bare_machine_is_enough():
    run = python("-c", BARE, **processes.INTERPRETED)
    assert run.returncode == 0, run.stderr[-3000:]


def test_without_a_gpu_it_says_what_is_missing():
    run = python("-m", "benchmarks.on_a_gpu", "--json", CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 2
    assert run.stdout == ""
    assert re.match(r"error: torch .*; expected an NVIDIA GPU.* `--tiny` runs", run.stderr)


def test_a_gpu_that_cannot_do_it_is_told_what_works_instead(monkeypatch):
    room = 70 << 30, 80 << 30
    machine.check_card("H100", (9, 0), room)
    with pytest.raises(ConfigError, match=r"V100: compute capability 7\.0; expected 8\.0.*chunked"):
        machine.check_card("V100", (7, 0), room)
    with pytest.raises(ConfigError, match=r"H100: 0\.5 of 80\.0 GiB are free; expected 16.*smi"):
        machine.check_card("H100", (9, 0), (1 << 29, 80 << 30))
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ConfigError, match=r"Triton does not import.*STILLROOM_SWEEP=torch"):
        machine.check_triton()


def test_a_section_that_is_not_there_is_named():
    assert chosen("bits,ceilings") == ["bits", "ceilings"]
    with pytest.raises(ConfigError, match=r"--only: no section 'bit'; expected some of contract_"):
        chosen("bit")


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("raise RuntimeError('CUDA error: misaligned address')", "RuntimeError: CUDA error: mis"),
        ("import os; os.kill(os.getpid(), 11)", "ended by SIGSEGV"),
        (
            "import signal; print('compiling', flush=True); signal.pause()",
            "no end after 5 s; last lines: compiling",
        ),
        ("pass", ""),
    ],
)
def test_however_a_section_ends_it_is_one_line(program, why, tmp_path):
    found = processes.run_within([sys.executable, "-c", program], 5, tmp_path / "log", {})
    assert found == "" if why == "" else why in found


def test_what_fails_does_not_stop_the_rest(monkeypatch, tmp_path):
    said = {
        "bits": ({}, "RuntimeError: CUDA error"),
        "ceilings": ({"copy_tb_s": 3.0}, ""),
        "odd_widths": ({"wrong": ["129: off by 1"]}, ""),
        "two_devices": ({"skipped": "one GPU"}, ""),
        "contract_gpu": ({"tests_passed": 3, "unfinished": "no end after 50 s"}, ""),
    }
    monkeypatch.setattr(processes, "_run", lambda name, scale, directory: said[name])
    result: dict = {}
    assert not command.run(list(said), Scale(True), result, tmp_path / "out.json")
    kept = json.loads((tmp_path / "out.json").read_text())["sections"]
    assert [told["outcome"] for told in kept.values()] == [
        *("failed", "passed", "wrong", "skipped", "timed out")
    ]
    assert kept["bits"]["why"] == "RuntimeError: CUDA error"
    assert kept["ceilings"]["copy_tb_s"] == 3.0
    assert command.run(["ceilings", "two_devices"], Scale(True), {}, tmp_path / "out.json")


def test_what_pytest_says_is_counted():
    log = "[gw0] [ 50%] PASSED tests/a.py::b\n[gw1] [100%] FAILED tests/a.py::c\n"
    log += "FAILED tests/a.py::c - assert 1\n"
    told = contracts.told(log, "exit 1")
    assert told == {
        "tests_passed": 1,
        "tests_failed": ["tests/a.py::c"],
        "wrong": ["1 tests failed"],
    }
    assert "wrong" not in contracts.told("tests/a.py::b PASSED  [100%]\n", "")
    late = contracts.told("tests/a.py::b PASSED  [ 10%]\n", "no end after 50 s")
    assert (late["tests_passed"], late["unfinished"]) == (1, "no end after 50 s")
    assert contracts.told("", "")["wrong"] == ["no test passed"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_runs_in_miniature(name):
    """All lines but those that only a GPU has: events, graphs, modes of waiting, nccl."""
    told = processes.outcome_of(name, Scale(True, 240))
    assert told["outcome"] == ("skipped" if name == "contract_gpu" else "passed"), told
    assert "nan" not in json.dumps(told).lower()


def test_the_command_prints_what_it_keeps(tmp_path):
    out = tmp_path / "result.json"
    asked = ["--tiny", "--json", "--only", "ceilings,contract_gpu", "--out", str(out)]
    run = python("-m", "benchmarks.on_a_gpu", *asked, "--limit", "240")
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(run.stdout)
    assert json.loads(out.read_text()) == result
    outcomes = {name: told["outcome"] for name, told in result["sections"].items()}
    assert outcomes == {"ceilings": "passed", "contract_gpu": "skipped"}
    assert result["versions"]["triton"] != "not installed"
