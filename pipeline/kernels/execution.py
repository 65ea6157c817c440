"""How a divergence is run: implementation, dtypes, memory.

One idea: the doors say what is computed, `chunked` how chunks go by; the choices between (which
sweep, in which dtype, within how many bytes) are made here, once for all doors.
"""

import importlib
import os
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from stillroom.pipeline.kernels import autocasting, dense_sweep, torch_sweep
from stillroom.pipeline.kernels.chunked import COLUMN_MULTIPLE, Plan, Sweep
from stillroom.pipeline.kernels.divergences import Objective
from stillroom.pipeline.kernels.precision import wide
from stillroom.pipeline.kernels.vocabulary_shards import Shard

Implementation = Literal["eager", "chunked", "triton"]
Door = TypeVar("Door", bound=Callable[..., Tensor])

CPU_BUDGET = 2**24, 2**28
"""16 MiB, within reach of a last-level cache, to 256 MiB; see `_budget`."""
CPU_ROWS = 256
"""Rows that a chunk has on a CPU whatever the head's width, if `CPU_BUDGET` allows: a product packs
the whole head for each (512 x 256 x 32,000: logits take 108 ms by 128 rows, 96 by 256). With the
teacher's logits beside them half as many take the same memory, and twice as much gains 3 % only."""
CUDA_BUDGET = 5 * 2**28
"""1.25 GiB: four thousand rows of bf16 logits over 152 thousand words."""

LEAST_CAPABILITY = 8, 0
"""Of an A100: the first with bf16, and the oldest for which the kernels are compiled in tests."""

DEBUG_VARIABLE = "STILLROOM_DEBUG_KERNELS"


def opaque(door: Door) -> Door:
    """What torch.compile is not to look into, where no operator stands for it (see `compiled`).

    Chunks write into one buffer in place and hand over gradients that were taken on the way.
    Traced, that becomes many graphs and copies of the buffer; as one call it is one graph break.
    """
    # As torch.compiler.disable, which would import the compiler (seconds) before it is asked for.
    disabled: Any = _disable_dynamo(door)
    return disabled


def traced() -> bool:
    """Whether a compiler looks at this call, which an operator then has to stand for."""
    return torch.compiler.is_compiling()


def debugging(debug: bool | None, hidden: Tensor) -> bool:
    """Whether tensors' values are checked: on the CPU by default, elsewhere when asked; asked of a
    tracer, which has no values, they break the graph."""
    if debug is not None:
        return debug
    if traced():
        return False
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
    teacher_itemsize: int = 0,
    compute: torch.dtype | None = None,
) -> Plan:
    """A plan for the fused form.

    Args:
        budget: bytes for a chunk's buffers, or None for the device's default.
        triton: the sweep takes logits in the products' dtype (others take fp32 or fp64), and
            Triton scales the gradients.
        teacher_itemsize: bytes of each of the teacher's logits, where a chunk has them too.
        compute: dtype of the products; None for what autocast says now.
    """
    compute = compute or autocasting.dtype_of(hidden)
    return Plan(
        sweep=sweep,
        sweep_dtype=compute if triton else wide(compute),
        targets=targets,
        objective=objective,
        shard=shard,
        compute_dtype=compute,
        sum_dtype=wide(compute) if accumulate_fp32 else unembedding.dtype,
        budget=budget or _budget(unembedding, compute, teacher_itemsize > 0),
        teacher_itemsize=teacher_itemsize,
        scale_=_triton("sweep").scale_ if triton else Tensor.mul_,
    )


def _budget(unembedding: Tensor, compute: torch.dtype, with_teacher: bool) -> int:
    """Bytes of a chunk's buffers: twice as many where the teacher's logits are among them.

    On a CPU small chunks stay in the cache, but each goes once over the whole of d_unembedding, and
    three times where the products are of another dtype (2,048 x 576 x 49,152 in bf16: 1.95 times
    the three products at 16 MiB, 1.26 at 96). So a chunk grows with that gradient.
    """
    if unembedding.is_cuda:
        return CUDA_BUDGET * (1 + with_teacher)
    least, most = CPU_BUDGET
    gradient = unembedding.nbytes if compute != unembedding.dtype else unembedding.nbytes // 2
    columns = len(unembedding) + COLUMN_MULTIPLE
    several = CPU_ROWS * columns * max(compute.itemsize, wide(compute).itemsize)
    return max(min(max(least, gradient), most) * (1 + with_teacher), min(several, most))


def sparse_sweep(impl: Implementation, hidden: Tensor, shard: Shard) -> Sweep:
    """The sweep of an implementation against a sparse teacher, or the reason why there is none.

    Raises:
        RuntimeError: Triton is missing, the device is not CUDA, or the dtype is fp64.
    """
    if impl == "chunked":
        return torch_sweep.sweep
    _require_triton(hidden)
    if shard.group is None:
        return _triton("sweep").sweep
    return _triton("shard_sweep").sweep


def dense_teacher_sweep(impl: Implementation, hidden: Tensor) -> Sweep:
    """The sweep of an implementation against a dense teacher; see `sparse_sweep`."""
    if impl == "chunked":
        return dense_sweep.sweep
    _require_triton(hidden)
    return _triton("dense_sweep").sweep


def triton_runs_on(device: torch.device) -> bool:
    """Whether the Triton sweeps run on a device (or, on a CPU, under their interpreter)."""
    try:
        return bool(_triton("rows").available(device))
    except RuntimeError:
        return False


def _require_triton(hidden: Tensor) -> None:
    if not _triton("rows").available(hidden.device):
        raise RuntimeError(f"impl: 'triton' needs a CUDA device; hidden is on {hidden.device}")
    if hidden.dtype == torch.float64:
        raise RuntimeError("impl: 'triton' computes in fp32; found fp64 inputs")
    if hidden.is_cuda and not torch.version.hip:
        found = torch.cuda.get_device_capability(hidden.device)
        if found < LEAST_CAPABILITY:
            raise RuntimeError(
                f"impl: 'triton' needs a GPU of compute capability {_dotted(LEAST_CAPABILITY)} or"
                f" more; {torch.cuda.get_device_name(hidden.device)} has {_dotted(found)}:"
                " use impl='chunked', which gives the same values there"
            )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _triton(module: str) -> Any:
    try:
        return importlib.import_module(f"stillroom.pipeline.kernels.triton.{module}")
    except ImportError as error:
        raise RuntimeError(f"impl: 'triton' needs Triton, which does not import: {error}") from None
