"""What `stillroom doctor` finds, and what it says where something is missing."""

import json
import os

import pytest

from stillroom.pipeline.beginning import checks
from stillroom.stages.__main__ import run as command


def found(capsys) -> dict[str, dict]:
    return {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}


@pytest.fixture
def imported(monkeypatch):
    """No other Python is started: what it takes seconds to import is another test's matter."""
    monkeypatch.setattr(checks, "IMPORTS", {"json": "import json"})


def test_a_machine_that_is_whole(imported, capsys):
    assert command(["doctor", "--no-serve", "--json"]) == 0
    findings = found(capsys)
    assert {finding["verdict"] for finding in findings.values()} <= {"ok", "warning"}
    assert "torch" in findings["packages"]["found"]
    assert "GB free" in findings["disk"]["found"]


def test_a_package_that_cannot_be_imported(monkeypatch, capsys):
    monkeypatch.setattr(checks, "IMPORTS", {"other": "import there_is_no_such_package"})
    assert command(["doctor", "--no-serve"]) == 2
    said = capsys.readouterr()
    assert "there_is_no_such_package" in said.out
    assert "make setup" in said.err


def test_a_torchvision_of_another_torch(monkeypatch, capsys):
    line = "raise RuntimeError('operator torchvision::nms does not exist')"
    monkeypatch.setattr(checks, "IMPORTS", {"vLLM": line})
    assert command(["doctor", "--no-serve"]) == 2
    assert "pip uninstall --yes torchvision" in capsys.readouterr().err


def test_the_models_of_a_run(imported, tmp_path, tiny_llama, capsys):
    text = 'name = "x"\ndirectory = "{}"\n[teacher]\nmodel = "{}"\n[train]\ncache = "{}"\n'
    file = tmp_path / "run.toml"
    file.write_text(text.format(tmp_path, tiny_llama, tmp_path / "nowhere"))
    assert command(["doctor", str(file), "--no-serve", "--json"]) == 2
    findings = found(capsys)
    assert "LlamaForCausalLM, 3 blocks" in findings["teacher"]["found"]
    assert findings["cache"]["verdict"] == "failed"
    assert "nowhere" in findings["cache"]["found"]


@pytest.mark.skipif(os.geteuid() != 0, reason="/proc refuses everyone, and this asks as root")
def test_a_directory_that_cannot_be_written():
    assert checks.room(checks.Path("/proc/1")).verdict == "failed"


def test_the_hub_is_not_asked_where_that_is_forbidden():
    assert "HF_HUB_OFFLINE" in checks.hub().found


@pytest.mark.vllm
def test_vllm_serves_here():
    assert checks.served().verdict == "ok"
