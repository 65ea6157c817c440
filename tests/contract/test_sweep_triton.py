"""The teacher's Triton sweep without a GPU: the contract of all sweeps under the interpreter, and
compiled for sm_90 to see what ptxas makes of it. On a GPU, `tests/gpu` runs the contract."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stillroom.pipeline.teacher.rows import RowSpec
from stillroom.pipeline.teacher.sweep.gpu import _sweep_row, launch_options, part_size
from tests.ahead_of_time import compile_kernel, read

CONTRACT = Path(__file__).with_name("test_sweeps.py")
OPTIONS = ("num_warps", "enable_fp_fusion", "maxnreg")
POINTERS = {
    "targets_ptr": "*i64",
    "positions_ptr": "*i64",
    "inverses_ptr": "*fp32",
    "ints_ptr": "*i32",
    "floats_ptr": "*fp32",
    "masses_ptr": "*fp32",
    "cdf_ptr": "*fp64",
    "near_ptr": "*i32",
    "top_ptr": "*i64",
}
NUMBERS = {"key": "i64", "stride": "i32", "vocab_size": "i32", "parts": "i32", "half": "i32"}


@pytest.mark.slow
def test_the_contract_holds_under_the_interpreter():
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "STILLROOM_TEST_SWEEPS": "sweep_triton"}
    quick = ["-k", "sweep_triton and not unbiased"]  # 8,000 rows one by one; their draws are tested
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", str(CONTRACT), *quick]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    assert re.search(r"\d{2} passed", run.stdout), run.stdout[-500:]


def compiled_kernel(spec: RowSpec, dtype: str, *, odd=False, architecture=90):
    constants = launch_options(151_936, spec)
    options = {name: constants.pop(name) for name in OPTIONS if name in constants}
    types = POINTERS | NUMBERS | {"logits_ptr": f"*{dtype}"}
    aligned = ("logits_ptr", "masses_ptr", "stride", "parts", *["vocab_size"] * (not odd))
    return compile_kernel(_sweep_row, types, constants, aligned, options, architecture)


ONE, FOUR, SIXTEEN = (1.0,), (0.5, 1.0, 2.0, 4.0), tuple(i / 4 for i in range(1, 17))


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
    build = read(compiled_kernel(RowSpec(k, draws, temperatures, True, True, 0), dtype))
    assert build.stack == build.spills == 0
    assert build.registers <= 128
    assert "ld.global.v4.b32" in build.ptx  # logits come in 128-bit words


def test_parts_are_many_enough_for_a_tight_bound():
    assert part_size(151_936, 64) == 128
    assert part_size(151_936, 512) == 128
    assert part_size(32_000, 512) == 16
    assert part_size(768, 512) == 1
    assert part_size(2, 1) == 1
