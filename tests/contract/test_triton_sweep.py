"""The Triton kernel without a GPU: the whole contract under the interpreter, and compiled for
sm_90 to see what ptxas makes of it. On a GPU, `tests/gpu` runs the contract for real."""

import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import get_args

import pytest

from stillroom.pipeline.kernels.divergences import DivergenceName, Objective
from stillroom.pipeline.kernels.triton import sweep as triton_sweep
from tests.ahead_of_time import read
from tests.kernel_builds import (
    CAPPED,
    DENSE,
    GRADIENT,
    PLAIN,
    SPARSE,
    STATISTICS,
    TEMPERED,
    compiled_kernel,
)

CONTRACT = [
    Path(__file__).with_name(name)
    for name in (
        "test_topk_divergence.py",
        "test_packed_topk.py",
        "test_packed_records.py",
        "test_linear_divergence.py",
        "test_cross_entropy_beside.py",
    )
]


@pytest.mark.slow
def test_the_contract_holds_under_the_interpreter():
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "STILLROOM_TEST_KERNELS": "triton"}
    runner = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "tests.interpreted"]
    command = [*runner, *map(str, CONTRACT)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    assert re.search(r"\d{3} passed", run.stdout), run.stdout[-500:]


SHARD = STATISTICS, GRADIENT
DIVERGENCES = get_args(DivergenceName)
COMPILED = [
    *product([SPARSE], DIVERGENCES, [64], [PLAIN, TEMPERED | CAPPED]),
    *product([SPARSE], ["forward_kl", "jsd"], [512], [PLAIN, TEMPERED, CAPPED, TEMPERED | CAPPED]),
    *product([DENSE], DIVERGENCES, [64], [PLAIN, TEMPERED | CAPPED]),
    *product(SHARD, ["forward_kl"], [64, 512], [PLAIN, TEMPERED, CAPPED, TEMPERED | CAPPED]),
]


@pytest.mark.parametrize(("kernel", "divergence", "k", "options"), COMPILED)
def test_it_compiles_for_hopper_without_spills(kernel, divergence, k, options):
    build = read(compiled_kernel(kernel, Objective(divergence, **options), k))
    assert build.stack == build.spills == 0
    assert build.registers <= 96


@pytest.mark.parametrize("k", [64, 512])
def test_packed_lists_compiled_kernel_without_spills(k):
    build = read(compiled_kernel(SPARSE, Objective(), k, packed=True))
    assert build.stack == build.spills == 0


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("kernel", [SPARSE, DENSE, SHARD[1]])
def test_logits_move_in_128_bit_words(kernel, dtype):
    """Eight bf16 or four fp32 in one instruction, in both directions."""
    assembler = compiled_kernel(kernel, Objective(), dtype=dtype).asm["ptx"]
    assert "ld.global.v4.b32" in assembler
    assert "st.global.v4.b32" in assembler


@pytest.mark.parametrize("kernel", [SPARSE, DENSE, *SHARD, triton_sweep._scale])
def test_no_offset_overflows_32_bits(kernel):
    """8,192 rows of 151,936 words are 1.2e9 elements, and two such chunks are more than int32
    counts: the program's number is widened before anything is multiplied by it."""
    code = compiled_kernel(kernel, Objective()).asm["ttir"]
    (program,) = re.findall(r"(%\w+) = tt.get_program_id x : i32", code)
    uses = [line for line in code.splitlines() if re.search(rf"{program}\b(?! = )", line)]
    assert uses
    assert all(re.search(r"= arith.extsi .* : i32 to i64", line) for line in uses), uses
