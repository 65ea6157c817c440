"""The sweep of a head sharded over ranks, in Triton: two kernels around the all-reduces.

One idea: what `triton.sweep` does in one program happens here in three steps. A kernel takes this
shard's statistics of every row and leaves minus infinity at the teacher's words; all-reduces and
the closed forms on [C, k + 1] numbers are torch's (`vocabulary_shards`, `torch_sweep`), since the
host is between the kernels anyway; a second kernel overwrites the logits with their gradient. Both
kernels touch a row from one program only. Importing this module imports Triton.
"""
# Triton reads `if ... else` on constants as compile-time choices, and its values have no types.
# ruff: noqa: RET505
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from stillroom.pipeline.kernels.divergences import Objective
from stillroom.pipeline.kernels.packed_topk import PackedTargets
from stillroom.pipeline.kernels.targets import Targets
from stillroom.pipeline.kernels.torch_sweep import Verdict, judge, label_column
from stillroom.pipeline.kernels.triton.rows import LOG2_E, cap, launch, tail_sums, write_tail
from stillroom.pipeline.kernels.triton.sweep import launch_options
from stillroom.pipeline.kernels.vocabulary_shards import FAR_BELOW as FAR
from stillroom.pipeline.kernels.vocabulary_shards import Shard, ShardStatistics

FAR_BELOW = tl.constexpr(FAR)


def sweep(
    buffer: Tensor,
    targets: Targets | PackedTargets,
    objective: Objective,
    shard: Shard,
    with_gradient: bool,
) -> Tensor:
    """Losses [C] of a chunk; `buffer` [C, width + spare] turns from raw logits into gradients.

    Args:
        buffer: fp32, bf16 or fp16; rows may be strided.
        targets: teacher, labels and weights of these rows, the same on every rank.
        objective: the loss of a row.
        shard: which words the columns are.
        with_gradient: False leaves the buffer undefined.
    """
    targets = targets.unpack()
    if not len(buffer):
        return torch.empty(0, dtype=torch.float32, device=buffer.device)
    columns = shard.columns(targets.ids).contiguous()
    label = label_column(targets, objective, shard)
    local = _statistics_(buffer, columns, label, objective, shard.width)
    verdict = judge(targets, objective, shard, local)
    if with_gradient:
        _gradient_(buffer, columns, label, objective, shard.width, local, verdict)
    return verdict.loss


def _statistics_(
    buffer: Tensor, columns: Tensor, label: Tensor | None, objective: Objective, width: int
) -> ShardStatistics:
    """This shard's statistics; leaves minus infinity at the words of the lists."""
    rows, k = columns.shape
    plain = label is not None and objective.temperature != 1
    support = torch.empty(rows, k, dtype=torch.float32, device=buffer.device)
    sums = torch.empty(5, rows, dtype=torch.float32, device=buffer.device)
    launch(
        _row_statistics,
        rows,
        buffer,
        buffer.stride(0),
        columns,
        columns if label is None else label,
        support,
        sums,
        sums.stride(0),
        width,
        k,
        1 / objective.temperature,
        LOG2_E.value / objective.temperature,
        objective.softcap or 1.0,
        LABELLED=label is not None,
        PLAIN=plain,
        CAPPED=objective.softcap is not None,
        BLOCK_K=triton.next_power_of_2(k),
        **launch_options(width, objective),
    )
    peak, total, at_label, plain_peak, plain_total = sums[:, :, None]
    if not plain:
        return ShardStatistics(support, peak, total, at_label)
    return ShardStatistics(support, peak, total, at_label, plain_peak, plain_total)


def _gradient_(
    buffer: Tensor,
    columns: Tensor,
    label: Tensor | None,
    objective: Objective,
    width: int,
    local: ShardStatistics,
    verdict: Verdict,
) -> None:
    """Overwrites the logits with d loss / d z; the words of the lists hold minus infinity."""
    rows, k = columns.shape
    plain_peak, plain_scale = local.tail_peak, verdict.hard
    if local.plain_peak is not None and local.plain_total is not None:
        plain_peak, plain_scale = local.plain_peak, verdict.plain / local.plain_total
    launch(
        _row_gradient,
        rows,
        buffer,
        buffer.stride(0),
        columns,
        columns if label is None else label,
        local.support,
        verdict.inside.contiguous(),
        verdict.outside / local.tail_total,
        local.tail_peak,
        plain_scale,
        plain_peak,
        local.label,
        verdict.hard,
        width,
        k,
        1 / objective.temperature,
        LOG2_E.value / objective.temperature,
        objective.temperature,
        objective.softcap or 1.0,
        LABELLED=label is not None,
        PLAIN=local.plain_peak is not None,
        CAPPED=objective.softcap is not None,
        BLOCK_K=triton.next_power_of_2(k),
        **launch_options(width, objective),
    )


@triton.jit
def _row_statistics(
    buffer,
    stride,
    columns_ptr,
    label_ptr,
    support_ptr,
    sums_ptr,
    sums_stride,
    width,
    k,
    cold,
    bits,
    softcap,
    LABELLED: tl.constexpr,
    PLAIN: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits = buffer + row * stride
    place = tl.arange(0, BLOCK_K)
    column = tl.load(columns_ptr + row * k + place, mask=place < k, other=width)
    here = column < width
    raw = tl.load(logits + column, mask=here, other=0.0).to(tl.float32)
    z, _ = cap(raw, softcap, CAPPED)
    x = tl.where(here, z * cold, FAR_BELOW)
    tl.store(support_ptr + row * k + place, x, mask=place < k)
    if LABELLED:
        label = tl.load(label_ptr + row)
        raw_label = tl.load(logits + label, mask=label < width, other=0.0).to(tl.float32)
        z_label, _ = cap(raw_label, softcap, CAPPED)
        tl.store(sums_ptr + 2 * sums_stride + row, tl.where(label < width, z_label, FAR_BELOW))
    else:
        tl.store(sums_ptr + 2 * sums_stride + row, FAR_BELOW)
    plain_top, plain_total = tl.full((), FAR_BELOW, tl.float32), tl.full((), 0.0, tl.float32)
    if PLAIN:
        named = tl.where(here, z, FAR_BELOW)
        plain_top = tl.max(named, 0)
        plain_total = tl.sum(tl.where(here, tl.exp(named - plain_top), 0.0), 0)
    tl.debug_barrier()
    tl.store(logits + column, float("-inf"), mask=here)
    tl.debug_barrier()

    peak, total, plain_rest = tail_sums(logits, width, bits, softcap, CAPPED, PLAIN, BLOCK_V)
    tl.store(sums_ptr + row, tl.where(peak > FAR_BELOW, peak * cold, FAR_BELOW))
    tl.store(sums_ptr + sums_stride + row, tl.where(total > 0, total, 1.0))
    if PLAIN:
        top = tl.maximum(plain_top, peak)
        plain_total = plain_total * tl.exp(plain_top - top)
        plain_total += plain_rest * tl.exp(peak - top)
        tl.store(sums_ptr + 3 * sums_stride + row, top)
        tl.store(sums_ptr + 4 * sums_stride + row, tl.where(plain_total > 0, plain_total, 1.0))


@triton.jit
def _row_gradient(
    buffer,
    stride,
    columns_ptr,
    label_ptr,
    support_ptr,
    inside_ptr,
    scale_ptr,
    peak_ptr,
    plain_scale_ptr,
    plain_peak_ptr,
    z_label_ptr,
    hard_ptr,
    width,
    k,
    cold,
    bits,
    temperature,
    softcap,
    LABELLED: tl.constexpr,
    PLAIN: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits = buffer + row * stride
    scale, peak = tl.load(scale_ptr + row), tl.load(peak_ptr + row)
    # The peak came as that of x; any logit near it anchors the powers as well.
    z_peak = tl.where(peak > FAR_BELOW, peak * temperature, FAR_BELOW)
    factor = scale * tl.exp(z_peak * cold - peak)
    plain_factor = 0.0
    if PLAIN:
        plain_scale, plain_peak = tl.load(plain_scale_ptr + row), tl.load(plain_peak_ptr + row)
        plain_factor = plain_scale * tl.exp(z_peak - plain_peak)
    write_tail(logits, width, bits, softcap, z_peak, factor, plain_factor, CAPPED, PLAIN, BLOCK_V)
    tl.debug_barrier()

    place = tl.arange(0, BLOCK_K)
    column = tl.load(columns_ptr + row * k + place, mask=place < k, other=width)
    here = column < width
    z = tl.load(support_ptr + row * k + place, mask=here, other=0.0) * temperature
    inside = tl.load(inside_ptr + row * k + place, mask=here, other=0.0)
    if PLAIN:
        inside += plain_scale * tl.exp(z - plain_peak)
    if LABELLED:
        label, hard = tl.load(label_ptr + row), tl.load(hard_ptr + row)
        inside -= tl.where(column == label, hard, 0.0)
        z_label = tl.load(z_label_ptr + row)
        at_label = scale * tl.exp(z_label * cold - peak) - hard
        if PLAIN:
            at_label += plain_scale * tl.exp(z_label - plain_peak)
        alone = (label < width) & (tl.sum((column == label).to(tl.int32), 0) == 0)
        at_label = (at_label * _slope(z_label, softcap, CAPPED)).to(buffer.dtype.element_ty)
        tl.store(logits + label, at_label, mask=alone)
    inside = inside * _slope(z, softcap, CAPPED)
    tl.store(logits + column, inside.to(buffer.dtype.element_ty), mask=here)


@triton.jit
def _slope(z, softcap, CAPPED: tl.constexpr):
    """1 - tanh^2 of the cap, from capped logits."""
    if CAPPED:
        bent = z / softcap
        return 1.0 - bent * bent
    else:
        return tl.full(z.shape, 1.0, tl.float32)
