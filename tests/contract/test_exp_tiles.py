"""The trial of ADR 0100 under the interpreter, against the truth of the divergences' contract, and
compiled for sm_90. In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def check():
    """Run by the test, under the interpreter."""
    import torch

    from benchmarks._exp_tiles import divergence
    from stillroom.pipeline.kernels.divergences import Objective
    from stillroom.pipeline.kernels.targets import Targets
    from tests.contract.divergence_cases import TOLERANCE, error, make_case

    blocks = {"BLOCK_R": 16, "BLOCK_V": 32, "BLOCK_D": 16}
    for options in (
        {},
        {"tail": "truncate"},
        {"tail": "renormalise", "temperature": 2.0},
        {"temperature": 0.5, "weights": torch.rand(11)},
        {"divergence": "reverse_kl"},
        {"divergence": "jsd", "beta": 0.3},
        {"sharpness": 6.0},
        {"words": 128, "k": 40},
    ):
        case = make_case(with_bias=False, **options)
        truth, naive = case.to(torch.float64).run("eager"), case.run("eager")
        settings = dict(case.options)
        weights = settings.pop("weights", None)
        objective = Objective(settings.pop("divergence", "forward_kl"), **settings)
        targets = Targets(case.ids, case.logprobs, None, weights)
        found = divergence(case.hidden, case.unembedding, targets, objective, blocks)
        for name, value in zip(("loss", "hidden", "unembedding"), found):
            allowed = error(naive[name], truth[name]) + TOLERANCE[torch.float32]
            assert error(value, truth[name]) <= allowed, (options, name)


def test_the_contract_holds_under_the_interpreter():
    command = [sys.executable, "-c", "from tests.contract import test_exp_tiles as t; t.check()"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-3000:]


TYPES = {
    "peaks_ptr": "*fp32",
    "sums_ptr": "*fp32",
    "scales_ptr": "*fp32",
    "support_ptr": "*fp32",
    "inside_ptr": "*fp32",
    "outside_ptr": "*fp32",
    "peak_ptr": "*fp32",
    "total_ptr": "*fp32",
    "columns_ptr": "*i64",
    "bits": "fp32",
} | dict.fromkeys(("rows", "words", "depth", "tiles", "k"), "i32")
MATRICES = ("hidden", "head", "powers", "out")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["_tiles", "_take_out", "_put_back", "_of_hidden", "_of_head"])
def test_it_compiles_for_hopper_without_spills(name):
    from benchmarks import _exp_tiles
    from tests.ahead_of_time import compile_kernel, read

    kernel = getattr(_exp_tiles, name)
    types = TYPES | dict.fromkeys(MATRICES, "*bf16")
    constants = _exp_tiles.BLOCKS | {"BLOCK_K": 64, "BLOCK_T": 2048}
    constants = {n: value for n, value in constants.items() if n in kernel.arg_names}
    types = {n: types[n] for n in kernel.arg_names if n not in constants}
    aligned = [n for n in (*MATRICES, "depth") if n in types]
    build = read(compile_kernel(kernel, types, constants, aligned, {"num_warps": 8}))
    assert build.spills == build.stack == 0
    assert ("wgmma" in build.ptx) == (name in ("_tiles", "_of_hidden", "_of_head"))
