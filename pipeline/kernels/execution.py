"""How a divergence is run: implementation, dtypes, memory.

One idea: the doors say what is computed, `chunked` how chunks go by; the choices between (which
sweep, in which dtype, within how many bytes) are made here, once for all doors.
"""

import os
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.kernels import autocasting, torch_sweep
from pipeline.kernels.chunked import Plan, Sweep
from pipeline.kernels.divergences import Objective
from pipeline.kernels.vocabulary_shards import Shard

Implementation = Literal["eager", "chunked", "triton"]

CPU_BUDGET = 2**24
"""16 MiB: within reach of a last-level cache."""
CUDA_BUDGET = 5 * 2**28
"""1.25 GiB: four thousand rows of bf16 logits over 152 thousand words."""

DEBUG_VARIABLE = "STILLROOM_DEBUG_KERNELS"


def debugging(debug: bool | None, hidden: Tensor) -> bool:
    """Whether tensors' values are checked: on the CPU by default, elsewhere when asked."""
    if debug is not None:
        return debug
    return hidden.device.type == "cpu" or os.environ.get(DEBUG_VARIABLE) == "1"


def plan(
    sweep: Sweep,
    hidden: Tensor,
    unembedding: Tensor,
    targets: Any,
    objective: Objective,
    shard: Shard,
    budget: int | None,
    accumulate_fp32: bool,
    *,
    triton: bool = False,
) -> Plan:
    """A plan for the fused form.

    Args:
        budget: bytes for a chunk's buffers, or None for the device's default.
        triton: the sweep takes logits in the products' dtype (others take fp32 or fp64), and
            Triton scales the gradients.
    """
    compute = autocasting.dtype_of(hidden)
    wide = torch.float64 if compute == torch.float64 else torch.float32
    return Plan(
        sweep=sweep,
        sweep_dtype=compute if triton else wide,
        targets=targets,
        objective=objective,
        shard=shard,
        compute_dtype=compute,
        sum_dtype=wide if accumulate_fp32 else unembedding.dtype,
        budget=budget or (CUDA_BUDGET if hidden.is_cuda else CPU_BUDGET),
        scale_=_triton().scale_ if triton else Tensor.mul_,
    )


def sparse_sweep(impl: Implementation, hidden: Tensor) -> Sweep:
    """The sweep of an implementation, or the reason why there is none.

    Raises:
        RuntimeError: Triton is missing, the device is not CUDA, or the dtype is fp64.
    """
    if impl == "chunked":
        return torch_sweep.sweep
    kernel = _triton()
    if not kernel.available(hidden.device):
        raise RuntimeError(f"impl: 'triton' needs a CUDA device; hidden is on {hidden.device}")
    if hidden.dtype == torch.float64:
        raise RuntimeError("impl: 'triton' computes in fp32; found fp64 inputs")
    return kernel.sweep


def _triton() -> Any:
    try:
        from pipeline.kernels import triton_sweep
    except ImportError as error:
        raise RuntimeError(f"impl: 'triton' needs Triton, which does not import: {error}") from None
    return triton_sweep
