"""The teacher's Triton sweep without a GPU: the contract of all sweeps under the interpreter, and
compiled for sm_90 to see what ptxas makes of it. On a GPU, `tests/gpu` runs the contract."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stillroom.pipeline.teacher.rows import RowSpec
from stillroom.pipeline.teacher.sweep.gpu import blocks_of_a_part
from tests.ahead_of_time import read
from tests.kernel_builds import FOUR, ONE, compiled_teacher_sweep

CONTRACT = Path(__file__).with_name("test_sweeps.py")


@pytest.mark.slow
def test_the_contract_holds_under_the_interpreter():
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "STILLROOM_TEST_SWEEPS": "sweep_triton"}
    quick = ["-k", "sweep_triton and not unbiased"]  # 8,000 rows one by one; their draws are tested
    runner = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "tests.interpreted"]
    command = [*runner, str(CONTRACT), *quick]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    assert re.search(r"\d{2} passed", run.stdout), run.stdout[-500:]


SIXTEEN = tuple(i / 4 for i in range(1, 17))


@pytest.mark.parametrize(
    ("k", "draws", "temperatures", "dtype"),
    [
        (64, 0, ONE, "bf16"),
        (64, 16, FOUR, "bf16"),
        (64, 16, FOUR, "fp32"),
        (0, 16, FOUR, "fp16"),
        (512, 512, FOUR, "bf16"),
        (64, 512, SIXTEEN, "bf16"),
    ],
)
def test_it_compiles_for_hopper_without_spills(k, draws, temperatures, dtype):
    build = read(compiled_teacher_sweep(RowSpec(k, draws, temperatures, True, True, 0), dtype))
    assert build.stack == build.spills == 0
    assert build.registers <= (128 if len(temperatures) < 5 else 255)
    assert "ld.global.v4.b32" in build.ptx  # logits come in 128-bit words


def test_parts_are_many_enough_for_a_tight_bound():
    assert blocks_of_a_part(151_936 // 4096, 256, 64) == 8
    assert blocks_of_a_part(151_936 // 4096, 256, 512) == 8
    assert blocks_of_a_part(32_000 // 4096, 256, 512) == 1
    assert blocks_of_a_part(1, 64, 512) == 1
