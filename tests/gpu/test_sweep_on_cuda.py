"""The contract of the teacher's sweeps on a real GPU, Triton compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stillroom.pipeline.teacher.rows import RowSpec
from stillroom.pipeline.teacher.sweep.blocks import check_sweep, rows_within, score_rows

CONTRACT = Path(__file__).parent.parent / "contract" / "test_sweeps.py"
EVERYTHING = RowSpec(64, 16, (0.5, 1.0, 2.0, 4.0), True, True, 0)


@pytest.mark.gpu
def test_the_contract_holds_on_cuda():
    sweeps = {"STILLROOM_TEST_DEVICE": "cuda", "STILLROOM_TEST_SWEEPS": "sweep sweep_triton"}
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", str(CONTRACT), "-k", "sweep"]
    run = subprocess.run(command, env=os.environ | sweeps, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [49_152, 151_936])
def test_what_an_engine_checks_when_it_starts(vocab_size):
    check_sweep(vocab_size, "cuda", EVERYTHING)


@pytest.mark.gpu
def test_extra_memory_stays_within_the_bound():
    vocab_size, bound = 151_936, 256 << 20
    head = torch.randn(vocab_size, 64, device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(4096, 64, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(0, vocab_size, (4096,), device="cuda")
    block = rows_within(bound, vocab_size, "cuda", EVERYTHING, head.dtype)
    positions = torch.arange(4096, device="cuda")

    def score(count: int) -> None:
        keys = torch.ones_like(positions[:count])
        asked = targets[:count], positions[:count], keys, lambda h: h @ head.T, block, True
        score_rows(EVERYTHING, [count], lambda a, b: hidden[a:b], *asked)

    score(2)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    score(4096)
    assert torch.cuda.max_memory_allocated() - before <= bound
