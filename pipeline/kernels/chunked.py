"""Fused form: chunks of rows, gradient taken in the forward pass, one buffer overwritten in place.

One idea: the logits of a chunk of rows live in one buffer; a *sweep* turns them into the rows'
losses and overwrites them with the gradient of the logits; two matrix products carry that gradient
to the hidden states and the head before the next chunk takes the buffer. What survives the forward
pass is [N, D] and [V, D], never [N, V]. `torch_sweep` runs on any device, `triton.sweep` is the
same contract in one kernel; this module does not know which it drives.

The gradient of a vector of losses is asked for later; what becomes of those kept is said in
`differentiation`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stillroom.pipeline.kernels import autocasting, products, scratch
from stillroom.pipeline.kernels.divergences import Objective
from stillroom.pipeline.kernels.precision import wide
from stillroom.pipeline.kernels.vocabulary_shards import Shard

COLUMN_MULTIPLE = 64
"""Rows of the buffer start at multiples of it, for vector loads and whole 128-byte lines of a
cache; at least one column is spare."""

ROW_MULTIPLE = 128
"""Rows of a chunk are a multiple of it where a chunk has that many: a tile of a matrix product."""

Sweep = Callable[[Tensor, Any, Objective, Shard, bool], Tensor]
"""(logits [C, width + spare], targets, objective, shard, with_gradient) -> losses [C]."""

Scale = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Plan:
    """How a divergence is computed: everything that is not differentiated.

    Attributes:
        sweep: turns a chunk's logits into losses and, in place, gradients.
        sweep_dtype: dtype of the buffer the sweep works in.
        targets: teacher, labels and weights; sliced by rows.
        objective: the loss of a row.
        shard: which words this process holds.
        compute_dtype: dtype of the matrix products.
        sum_dtype: dtype in which d_unembedding is summed over chunks.
        budget: bytes that the buffers of one chunk may take.
        scale_: multiplies a finished gradient by a device's number, in place.
        teacher_itemsize: bytes of each of the logits that the sweep makes of the teacher's side.
    """

    sweep: Sweep
    sweep_dtype: torch.dtype
    targets: Any
    objective: Objective
    shard: Shard
    compute_dtype: torch.dtype
    sum_dtype: torch.dtype
    budget: int
    scale_: Scale = Tensor.mul_
    teacher_itemsize: int = 0

    @property
    def loss_dtype(self) -> torch.dtype:
        """fp32, or fp64 where the inputs are."""
        return wide(self.compute_dtype)


class Gradients(NamedTuple):
    """Gradients with respect to hidden, unembedding and bias; None where not asked for."""

    hidden: Tensor | None
    unembedding: Tensor | None
    bias: Tensor | None


def sweep_rows(
    hidden: Tensor,
    unembedding: Tensor,
    bias: Tensor | None,
    plan: Plan,
    needed: tuple[bool, ...] = (False, False, False),
) -> tuple[Tensor, Gradients, Tensor | None]:
    """Losses [N], the gradients of their sum, and the unit the gradients are in (None is 1).

    Rows of weight 0 are left out beforehand where that can be seen without asking a device. In
    fp16 the largest weight is the gradients' unit: 1 / count would flush them to zero.
    """
    weights = plan.targets.weights
    if weights is None:
        return *_sweep_chunks(hidden, unembedding, bias, plan, needed), None
    keep = rows_with_weight(weights)
    weights, unit = weights.to(hidden.device, non_blocking=True), None
    if plan.compute_dtype == torch.float16 and weights.numel():
        unit = weights.abs().amax().clamp(min=1e-30)  # all may be 0
        weights = weights / unit
    plan = replace(plan, targets=replace(plan.targets, weights=weights))
    if keep is None:
        loss, gradients = _sweep_chunks(hidden, unembedding, bias, plan, needed)
    else:
        loss, gradients = _sweep_some(hidden, unembedding, bias, plan, needed, keep)
    return loss if unit is None else loss * unit, gradients, unit


def rows_with_weight(weights: Tensor) -> Tensor | None:
    """Rows worth computing, or None for all of them.

    Counting on a device would stop the host, so rows are dropped when the weights are on the CPU.
    """
    if weights.device.type != "cpu" or bool(weights.all()):
        return None
    return weights.nonzero().flatten()


def _sweep_some(
    hidden: Tensor,
    unembedding: Tensor,
    bias: Tensor | None,
    plan: Plan,
    needed: tuple[bool, ...],
    keep: Tensor,
) -> tuple[Tensor, Gradients]:
    keep = keep.to(hidden.device, non_blocking=True)
    told = plan.targets.cross_entropy
    plan = replace(plan, targets=plan.targets[keep])
    loss, gradients = _sweep_chunks(hidden[keep], unembedding, bias, plan, needed)
    if told is not None:
        told.zero_().index_copy_(0, keep, plan.targets.cross_entropy)
    loss = loss.new_zeros(len(hidden)).index_copy_(0, keep, loss)
    if gradients.hidden is not None:
        rows = gradients.hidden.new_zeros(hidden.shape).index_copy_(0, keep, gradients.hidden)
        gradients = gradients._replace(hidden=rows)
    return loss, gradients


def _sweep_chunks(
    hidden: Tensor, unembedding: Tensor, bias: Tensor | None, plan: Plan, needed: tuple[bool, ...]
) -> tuple[Tensor, Gradients]:
    with autocasting.off(hidden.device):
        bench = _workbench(hidden, unembedding, bias, plan, needed)
        loss = torch.empty(len(hidden), dtype=plan.loss_dtype, device=hidden.device)
        for rows in bench.chunks:
            logits, targets = bench.logits(rows), plan.targets[rows]
            loss[rows] = plan.sweep(logits, targets, plan.objective, plan.shard, any(needed))
            bench.add_gradients(rows)
        return loss, bench.gradients()


def _workbench(
    hidden: Tensor, unembedding: Tensor, bias: Tensor | None, plan: Plan, needed: tuple[bool, ...]
) -> "Workbench":
    try:
        return Workbench(hidden, unembedding, bias, plan, needed)
    except torch.OutOfMemoryError as error:
        kept = hidden.numel() * plan.compute_dtype.itemsize * needed[0]
        kept += unembedding.numel() * plan.sum_dtype.itemsize * needed[1]
        raise torch.OutOfMemoryError(
            f"{hidden.device} has no room for a divergence of {len(hidden)} rows over"
            f" {len(unembedding)} words: its gradients take {kept / 2**20:.0f} MiB and the logits"
            f" of a chunk up to {plan.budget / 2**20:.0f}; give a smaller memory_budget (in bytes;"
            " the values stay the same), or fewer rows at a time"
        ) from error


def chunk_rows(rows: int, bytes_per_row: int, budget: int) -> int:
    """Rows of one chunk: as many as the budget allows, in chunks of nearly equal size."""
    most = max(1, budget // bytes_per_row)
    if rows <= most:
        return max(1, rows)
    multiple = ROW_MULTIPLE if most >= ROW_MULTIPLE else 1
    most -= most % multiple
    even = -(-rows // -(-rows // most))
    return -(-even // multiple) * multiple


class Workbench:
    """The buffers of one call and the three matrix products over them."""

    def __init__(
        self,
        hidden: Tensor,
        unembedding: Tensor,
        bias: Tensor | None,
        plan: Plan,
        needed: tuple[bool, ...],
    ):
        self.plan, width = plan, plan.shard.width
        self.hidden = hidden.to(plan.compute_dtype)
        self.head = unembedding[:width].to(plan.compute_dtype)
        self.bias = None if bias is None else bias[:width].to(plan.compute_dtype)
        # Contiguous, as the operator's statement of its outputs says, whatever hidden's strides.
        self.of_hidden = _empty(hidden.shape, hidden, plan.compute_dtype, needed[0])
        self.of_head = _empty(unembedding.shape, unembedding, plan.sum_dtype, needed[1])
        self.of_bias = _empty(unembedding.shape[:1], unembedding, plan.loss_dtype, needed[2])
        self.dtypes = hidden.dtype, unembedding.dtype, bias.dtype if bias is not None else None
        self._make_buffers(len(hidden))
        self.fresh = True

    def _make_buffers(self, rows: int) -> None:
        plan, device = self.plan, self.hidden.device
        columns = (plan.shard.largest // COLUMN_MULTIPLE + 1) * COLUMN_MULTIPLE  # one spare
        same = plan.sweep_dtype == plan.compute_dtype
        # The sweep's buffer, the products' where it is another, and the teacher's logits.
        bytes_per_row = columns * (
            plan.sweep_dtype.itemsize
            + (not same) * plan.compute_dtype.itemsize
            + plan.teacher_itemsize
        )
        size = chunk_rows(rows, bytes_per_row, plan.budget)
        self.chunks = [slice(i, min(i + size, rows)) for i in range(0, rows, size)]
        self.product = scratch.rows_of(size, columns, plan.compute_dtype, device)
        if device.type == "cpu":  # whose half-precision products read on beyond a row's words
            self.product[:, plan.shard.width :] = 0  # and multiply by 0: no NaN may lie there
        self.buffer = (
            self.product if same else scratch.rows_of(size, columns, plan.sweep_dtype, device)
        )

    def logits(self, rows: slice) -> Tensor:
        """The sweep's buffer, filled with the raw logits of these rows."""
        hidden, width = self.hidden[rows], self.plan.shard.width
        product = self.product[: len(hidden), :width]
        products.logits(hidden, self.head, self.bias, out=product)
        buffer = self.buffer[: len(hidden)]
        if self.buffer is not self.product:
            buffer[:, :width].copy_(product)
        return buffer

    def add_gradients(self, rows: slice) -> None:
        """Carries the gradient in the buffer on to hidden states, head and bias."""
        hidden, width = self.hidden[rows], self.plan.shard.width
        gradient = self.product[: len(hidden), :width]
        if self.buffer is not self.product:
            gradient.copy_(self.buffer[: len(hidden), :width])
        if self.of_hidden is not None:
            torch.mm(gradient, self.head, out=self.of_hidden[rows])  # [C, V] [V, D]
        if self.of_head is not None:
            products.add_(self.of_head[:width], gradient.T, hidden, self.fresh)  # [V, C] [C, D]
        if self.of_bias is not None:
            total = self.buffer[: len(hidden), :width].sum(0, dtype=self.of_bias.dtype)
            self.of_bias[:width].copy_(total) if self.fresh else self.of_bias[:width].add_(total)
        self.fresh = False

    def gradients(self) -> Gradients:
        """The finished gradients, in the dtypes of what they belong to."""
        unused = 0 if self.fresh else self.plan.shard.width  # padded rows, or all without a chunk
        for tensor in (self.of_head, self.of_bias):
            if tensor is not None:
                tensor[unused:] = 0
        if self.of_hidden is not None:
            self.plan.shard.sum_(self.of_hidden)
        made = zip((self.of_hidden, self.of_head, self.of_bias), self.dtypes)
        return Gradients(*(None if t is None else t.to(dtype) for t, dtype in made))


def _empty(shape: torch.Size, like: Tensor, dtype: torch.dtype, needed: bool) -> Tensor | None:
    return torch.empty(shape, dtype=dtype, device=like.device) if needed else None
