"""A benchmark that lacks a model says what to run; one that lacks a peer goes on and says so."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks import _divergence_contenders as contenders
from benchmarks import needs, topk_divergence
from benchmarks._divergence_contenders import Contender, ours
from stillroom.cache_schemas.errors import TeacherError

PROGRAMS = [
    path for path in Path(needs.__file__).parent.glob("*.py") if "__main__" in path.read_text()
]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_every_benchmark_starts_through_the_one_door(path):
    text = path.read_text()
    assert text.endswith('if __name__ == "__main__":\n    needs.run(main)\n')
    if "--model" in text:
        assert '"--model", default=needs.MODEL' in text
        assert re.search(r"needs\.model\(\w+\.model\)", text)


def test_a_missing_model_is_one_message_with_the_command_that_makes_it(capsys):
    with pytest.raises(SystemExit) as ended:
        needs.run(lambda: print(needs.model(".cache/models/none")))
    assert ended.value.code == TeacherError.exit_code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: .cache/models/none: no such directory")
    assert "Run `stillroom teacher fetch smollm2`, which makes .cache/models/" in shown.err
    assert shown.err.count("\n") == 1


def test_a_model_that_is_there_is_its_directory(tiny_llama):
    assert needs.model(str(tiny_llama)) == str(tiny_llama)


def test_a_missing_peer_is_a_row_with_the_reason_and_the_rest_is_measured(monkeypatch):
    def absent(_):
        raise ModuleNotFoundError("No module named 'liger_kernel'", name="liger_kernel.ops")

    peer = Contender("a peer", "jsd", "dense", absent)
    monkeypatch.setattr(contenders, "on_cpu", lambda: [peer, ours("chunked")])
    monkeypatch.setattr(topk_divergence, "CPU_PROBLEM", {"n": 6, "d": 8, "v": 40, "k": 3})
    monkeypatch.setattr(topk_divergence, "_extra_peak_in_a_process", lambda place: place)
    result = topk_divergence.measure_cpu(rounds=1)
    left_out, measured = result["rows"]
    assert left_out["failed"] == needs.why_not(ModuleNotFoundError(name="liger_kernel"))
    assert "run `pip install 'stillroom[peers]'`" in left_out["failed"]
    assert measured["extra_peak_bytes"] == 1
    assert measured["seconds"] > 0
    assert topk_divergence.table(result).endswith(f"not measured: a peer: {left_out['failed']}")


def test_other_failures_are_told_as_they_are():
    assert needs.why_not(torch.OutOfMemoryError("no room")) == "OutOfMemoryError: no room"
    assert needs.why_not(ModuleNotFoundError("no x", name="x")) == "ModuleNotFoundError: no x"
