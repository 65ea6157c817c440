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
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pipeline.kernels.divergences import DivergenceName, Objective
from pipeline.kernels.triton_sweep import _sweep_row, launch_options

CONTRACT = [
    Path(__file__).with_name(name) for name in ("test_topk_divergence.py", "test_packed_topk.py")
]
HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {
    "ids_or_gaps_ptr": "*i32",
    "first_ptr": "*i32",
    "logprobs_or_ranks_ptr": "*fp32",
    "classes_ptr": "*u8",
    "counts_ptr": "*i32",
    "shift_ptr": "*fp32",
    "table_ptr": "*fp32",
    "lookup_ptr": "*i32",
    "labels_ptr": "*i64",
    "weights_ptr": "*fp32",
    "loss_ptr": "*fp32",
}
PACKED_POINTERS = {"ids_or_gaps_ptr": "*u8", "logprobs_or_ranks_ptr": "*i16"}
INTEGERS = ("stride", "width", "k", "length", "words")
PLAIN = {}
TEMPERED = {"temperature": 2.0, "ce_weight": 0.5}
CAPPED = {"softcap": 30.0}


@pytest.mark.slow
def test_the_contract_holds_under_the_interpreter():
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "STILLROOM_TEST_KERNELS": "triton"}
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", *map(str, CONTRACT)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    assert re.search(r"\d{3} passed", run.stdout), run.stdout[-500:]


def compile_for_hopper(objective, k, dtype="bf16", packed=False):
    """Assembler of the kernel for a vocabulary of 151,936, and ptxas's report on it."""
    options = launch_options(151_936, objective)
    hard = objective.ce_weight > 0
    constants = {
        "PACKED": packed,
        "DIVERGENCE": objective.divergence,
        "TAIL": objective.tail,
        "HARD": hard,
        "PLAIN": hard and objective.temperature != 1,
        "WEIGHTED": True,
        "CAPPED": objective.softcap is not None,
        "GRADIENT": True,
        "BLOCK_K": triton.next_power_of_2(k),
        "BLOCK_V": options.pop("BLOCK_V"),
    }
    place = _sweep_row.arg_names.index
    types = dict.fromkeys(_sweep_row.arg_names, "fp32") | POINTERS
    types |= {"buffer": f"*{dtype}"} | dict.fromkeys(INTEGERS, "i32")
    types |= PACKED_POINTERS if packed else {}
    types |= dict.fromkeys(constants, "constexpr")
    aligned = {(place(name),): [["tt.divisibility", 16]] for name in ("buffer", "stride", "width")}
    source = ASTSource(
        _sweep_row, types, {(place(name),): value for name, value in constants.items()}, aligned
    )
    return triton.compile(source, target=HOPPER, options=options)


def ptxas_report(kernel, tmp_path):
    """What ptxas says with Triton's own flags."""
    source = tmp_path / "kernel.ptx"
    source.write_text(kernel.asm["ptx"])
    ptxas = triton.knobs.nvidia.ptxas_blackwell.path
    flags = ["-v", "-lineinfo", "--regAllocOptLevel=2", "--gpu-name=sm_90a"]
    run = subprocess.run(
        [ptxas, *flags, str(source), "-o", "/dev/null"], capture_output=True, text=True, check=True
    )
    return run.stdout + run.stderr


COMPILED = [
    *product(get_args(DivergenceName), [64], [PLAIN, TEMPERED | CAPPED]),
    *product(["forward_kl", "jsd"], [512], [PLAIN, TEMPERED, CAPPED, TEMPERED | CAPPED]),
]


@pytest.mark.parametrize(("divergence", "k", "options"), COMPILED)
def test_it_compiles_for_hopper_without_spills(divergence, k, options, tmp_path):
    kernel = compile_for_hopper(Objective(divergence, **options), k)
    report = ptxas_report(kernel, tmp_path)
    assert "0 bytes spill stores, 0 bytes spill loads" in report
    registers = int(re.search(r"Used (\d+) registers", report)[1])
    assert registers <= 96


@pytest.mark.parametrize("k", [64, 512])
def test_packed_lists_compile_for_hopper_without_spills(k, tmp_path):
    kernel = compile_for_hopper(Objective(), k, packed=True)
    assert "0 bytes spill stores, 0 bytes spill loads" in ptxas_report(kernel, tmp_path)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_logits_move_in_128_bit_words(dtype):
    """Eight bf16 or four fp32 in one instruction, in both directions."""
    assembler = compile_for_hopper(Objective(), 64, dtype).asm["ptx"]
    assert "ld.global.v4.b32" in assembler
    assert "st.global.v4.b32" in assembler
