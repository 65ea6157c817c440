"""Which of the project's Triton kernels are compiled ahead of time, with which arguments.

One idea: a case is a kernel with the types, constants and options that a launch at 151,936 words
would give it, so that tests and `benchmarks.kernel_builds` look at the same machine code.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton

from stillroom.pipeline.kernels.divergences import Objective
from stillroom.pipeline.kernels.triton import dense_sweep, shard_sweep, sweep
from stillroom.pipeline.teacher.rows import RowSpec
from stillroom.pipeline.teacher.sweep import gpu, gpu_program
from tests.ahead_of_time import compile_kernel

WORDS = 151_936
TYPES = {
    "ids_or_gaps_ptr": "*i32",
    "first_ptr": "*i32",
    "logprobs_or_ranks_ptr": "*fp32",
    "classes_ptr": "*u8",
    "counts_ptr": "*i32",
    "shift_ptr": "*fp32",
    "table_ptr": "*fp32",
    "lookup_ptr": "*i32",
    "labels_ptr": "*i64",
    "label_ptr": "*i64",
    "columns_ptr": "*i64",
    "factor_ptr": "*fp32",
} | dict.fromkeys(
    ["stride", "teacher_stride", "sums_stride", "width", "k", "length", "words", "size"], "i32"
)
PACKED_TYPES = {"ids_or_gaps_ptr": "*u8", "logprobs_or_ranks_ptr": "*i16"}
BUFFERS = ("buffer", "teacher_buffer", "gradient")
ALIGNED = (*BUFFERS, "stride", "teacher_stride", "width")
OPTIONS = ("num_warps", "enable_fp_fusion", "maxnreg")
TEACHER_POINTERS = {
    "targets_ptr": "*i64",
    "positions_ptr": "*i64",
    "keys_ptr": "*i64",
    "inverses_ptr": "*fp32",
    "ints_ptr": "*i32",
    "floats_ptr": "*fp32",
    "maxima_ptr": "*fp32",
    "masses_ptr": "*fp32",
    "cdf_ptr": "*fp64",
    "near_ptr": "*i32",
    "top_ptr": "*i64",
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TEACHER_NUMBERS = {
    "stride": "i32",
    "vocab_size": "i32",
    "parts": "i32",
    "half": "i32",
}

PLAIN: dict[str, Any] = {}
TEMPERED = {"temperature": 2.0, "ce_weight": 0.5}
CAPPED = {"softcap": 30.0}
SPARSE, DENSE = sweep._sweep_row, dense_sweep._sweep_row
STATISTICS, GRADIENT = shard_sweep._row_statistics, shard_sweep._row_gradient
ONE, FOUR = (1.0,), (0.5, 1.0, 2.0, 4.0)


def compiled_kernel(
    kernel, objective, k=64, dtype="bf16", *, packed=False, odd=False, architecture=90
):
    """A kernel for a vocabulary of 151,936 (or, odd, of a width that 16 does not divide), with
    every option the objective asks for."""
    hard = objective.ce_weight > 0
    constants = {
        "PACKED": packed,
        "DIVERGENCE": objective.divergence,
        "TAIL": objective.tail,
        "HARD": hard,
        "LABELLED": hard,
        "PLAIN": hard and objective.temperature != 1,
        "WEIGHTED": True,
        "CAPPED": objective.softcap is not None,
        "TEACHER_CAPPED": objective.softcap is not None,
        "GRADIENT": True,
        "BLOCK_K": triton.next_power_of_2(k),
        "BLOCK": 4096,
    }
    options = sweep.launch_options(WORDS, objective)
    if kernel is DENSE:
        options = dense_sweep.launch_options(WORDS)
    constants["BLOCK_V"] = options.pop("BLOCK_V")
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    types = TYPES | (PACKED_TYPES if packed else {})
    types |= dict.fromkeys(BUFFERS, f"*{dtype}")
    types = {n: types.get(n, "*fp32" if n.endswith("_ptr") else "fp32") for n in names}
    aligned = [name for name in ALIGNED if name in names and not (odd and name == "width")]
    return compile_kernel(kernel, types, constants, aligned, options, architecture)


def compiled_teacher_sweep(spec: RowSpec, dtype: str, *, odd=False, architecture=90):
    """The teacher's sweep, likewise."""
    constants = gpu.launch_options(WORDS, spec, DTYPES[dtype])
    options = {name: constants.pop(name) for name in OPTIONS if name in constants}
    types = TEACHER_POINTERS | TEACHER_NUMBERS | {"logits_ptr": f"*{dtype}"}
    aligned = ("logits_ptr", "masses_ptr", "stride", "parts", *["vocab_size"] * (not odd))
    return compile_kernel(gpu_program.sweep_row, types, constants, aligned, options, architecture)


def _sparse(divergence: str = "forward_kl", **changes: Any) -> Callable:
    options = changes.pop("options", PLAIN)
    return partial(compiled_kernel, SPARSE, Objective(divergence, **options), **changes)  # type: ignore[arg-type]


def _teacher(k: int, draws: int, temperatures: tuple[float, ...], **changes: Any) -> Callable:
    spec = RowSpec(k, draws, temperatures, True, True, 0)
    return partial(compiled_teacher_sweep, spec, "bf16", **changes)


HEAVY = TEMPERED | CAPPED
CASES: dict[str, Callable] = {
    "sparse": _sparse(),
    "sparse, odd width": _sparse(odd=True),
    "sparse JSD, T = 2, cap, CE": _sparse("jsd", options=HEAVY),
    "sparse, packed lists": _sparse(packed=True),
    "dense": partial(compiled_kernel, DENSE, Objective()),
    "dense JSD, T = 2, cap, CE": partial(compiled_kernel, DENSE, Objective("jsd", **HEAVY)),
    "shard: statistics": partial(compiled_kernel, STATISTICS, Objective()),
    "shard: gradient": partial(compiled_kernel, GRADIENT, Objective()),
    "teacher 12 + 56": _teacher(12, 56, ONE),
    "teacher 12 + 56, odd width": _teacher(12, 56, ONE, odd=True),
    "teacher 64 + 0": _teacher(64, 0, ONE),
    "teacher 64 + 16, four T": _teacher(64, 16, FOUR),
    "teacher 512 + 512, four T": _teacher(512, 512, FOUR),
}
"""Name -> a function of `architecture` that compiles; k = 64 and forward KL where none is named."""
