"""The sweep as one Triton kernel: a program per row, two passes over its logits, nothing else.

One idea: the k logits of the teacher's words go to registers and minus infinity to their places;
one online pass over the row gives the tail's log-sum-exp, closed forms on k + 1 numbers give the
loss, one scalar for the words outside and k values for those inside; a second pass overwrites the
logits with their gradient. The formulas are those of `divergences` and `topk_divergence`, here once
more in Triton; the contract suite holds both to the same fp64 truth. A row's list may come packed
(`packed_topk`) and is then decoded in registers.

Barriers stand where one thread's stores to the row are another's loads. Importing this module
imports Triton.
"""
# Triton reads `if ... else` on constants as compile-time choices, and its values have no types.
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from stillroom.pipeline.kernels import divergences
from stillroom.pipeline.kernels.divergences import Objective
from stillroom.pipeline.kernels.packed_topk import PackedTargets, PackedTopk
from stillroom.pipeline.kernels.targets import Targets
from stillroom.pipeline.kernels.triton.rows import (
    LOG2_E,
    NUM_WARPS,
    block_of,
    cap,
    launch,
    load,
    registers,
    store,
    tail_sums,
    terms,
    write_tail,
)
from stillroom.pipeline.kernels.vocabulary_shards import FAR_BELOW as FAR
from stillroom.pipeline.kernels.vocabulary_shards import Shard

LOG_ZERO = tl.constexpr(divergences.LOG_ZERO)
LOG_TAIL_FLOOR = tl.constexpr(divergences.LOG_TAIL_FLOOR)
HEAD_MASS = tl.constexpr(divergences.HEAD_MASS)
FAR_BELOW = tl.constexpr(FAR)

PLAIN_BLOCK, HEAVY_BLOCK, HEAVY_REGISTERS = 8192, 4096, 96
"""Words of a block. Where a word needs two exponentials or a tanh, a smaller block and a limit that
is above what it needs keep ptxas from spilling a few bytes to reach a higher occupancy."""


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
        targets: teacher, labels and weights of these rows.
        objective: the loss of a row.
        shard: must hold all words.
        with_gradient: False leaves the buffer undefined.
    """
    loss = torch.empty(len(buffer), dtype=torch.float32, device=buffer.device)
    if not len(buffer):
        return loss
    lists, k = _lists(targets, objective)
    hard = targets.labels is not None and objective.ce_weight > 0
    labels = targets.labels.contiguous() if targets.labels is not None else loss
    weights = loss if targets.weights is None else targets.weights.float().contiguous()
    told = targets.cross_entropy if targets.cross_entropy is not None else torch.empty_like(loss)
    launch(
        _sweep_row,
        len(buffer),
        buffer,
        buffer.stride(0),
        *lists,
        labels,
        weights,
        loss,
        told,
        shard.width,
        k,
        1 / objective.temperature,
        LOG2_E.value / objective.temperature,
        objective.temperature,
        objective.beta,
        objective.alpha,
        objective.ce_weight,
        objective.softcap or 1.0,
        PACKED=isinstance(targets, PackedTargets),
        DIVERGENCE=objective.divergence,
        TAIL=objective.tail,
        HARD=hard,
        PLAIN=hard and objective.temperature != 1,
        WEIGHTED=targets.weights is not None,
        CAPPED=objective.softcap is not None,
        GRADIENT=with_gradient,
        BLOCK_K=triton.next_power_of_2(k),
        **launch_options(shard.width, objective),
    )
    return loss


def _lists(targets: Targets | PackedTargets, objective: Objective) -> tuple[tuple, int]:
    """The kernel's arguments for the rows' lists, and k."""
    if isinstance(targets, PackedTargets):
        packed = targets.lists
        rows = (getattr(packed, name).contiguous() for name in PackedTopk.ROWS)
        tables = packed.scale, packed.table, packed.lookup, packed.length, packed.words
        return (*rows, *tables), packed.shape[1]
    if objective.divergence == "adaptive_kl":
        targets = _sorted(targets)
    ids, logprobs = targets.ids.contiguous(), targets.logprobs.float().contiguous()
    return (ids, ids, logprobs, ids, ids, ids, 1.0, ids, ids, 0, 0), ids.shape[1]


def scale_(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient *= factor, in place, touching no memory where the device finds that factor is 1."""
    if not gradient.is_contiguous():
        return gradient.mul_(factor)
    size, block = gradient.numel(), 4096
    launch(_scale, triton.cdiv(size, block), gradient, factor, size, BLOCK=block)
    return gradient


def launch_options(width: int, objective: Objective) -> dict[str, int]:
    """Block size, warps and registers for an objective."""
    tempered = objective.ce_weight > 0 and objective.temperature != 1
    heavy = objective.softcap is not None or tempered
    block = HEAVY_BLOCK if heavy else PLAIN_BLOCK
    limit = registers(HEAVY_REGISTERS) if heavy else {}
    limit |= {"num_warps": NUM_WARPS, "enable_fp_fusion": True}
    return {"BLOCK_V": block_of(block, width)} | limit


def _sorted(targets: Targets) -> Targets:
    """Lists by falling probability, which AKL's head is a prefix of."""
    key = targets.logprobs.masked_fill(targets.ids < 0, -torch.inf)
    order = key.sort(dim=1, descending=True, stable=True).indices
    ids, logprobs = targets.ids.gather(1, order), targets.logprobs.gather(1, order)
    return Targets(ids, logprobs, targets.labels, targets.weights)


@triton.jit
def _scale(gradient, factor_ptr, size, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        if start + BLOCK <= size:
            _times(gradient, start + tl.arange(0, BLOCK), factor, size, True)
        else:
            _times(gradient, start + tl.arange(0, BLOCK), factor, size, False)


@triton.jit
def _times(gradient, place, factor, size, WHOLE: tl.constexpr):
    value, _ = load(gradient, place, size, 1.0, False, WHOLE)
    store(gradient, place, value * factor, size, WHOLE)


@triton.jit
def _sweep_row(
    buffer,
    stride,
    ids_or_gaps_ptr,
    first_ptr,
    logprobs_or_ranks_ptr,
    classes_ptr,
    counts_ptr,
    shift_ptr,
    scale,
    table_ptr,
    lookup_ptr,
    length,
    words,
    labels_ptr,
    weights_ptr,
    loss_ptr,
    told_ptr,
    width,
    k,
    cold,
    bits,
    temperature,
    beta,
    alpha,
    ce_weight,
    softcap,
    PACKED: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    TAIL: tl.constexpr,
    HARD: tl.constexpr,
    PLAIN: tl.constexpr,
    WEIGHTED: tl.constexpr,
    CAPPED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits = buffer + row * stride
    place = tl.arange(0, BLOCK_K)
    if PACKED:
        inside_list = place < tl.load(counts_ptr + row)
        gap = tl.load(ids_or_gaps_ptr + row * k + place, mask=inside_list, other=0).to(tl.int32)
        level = tl.load(first_ptr + row) + tl.cumsum(gap, 0)
        table = tl.load(table_ptr + level, mask=inside_list, other=0.0)
        given = table * scale + tl.load(shift_ptr + row)
        rank = tl.load(logprobs_or_ranks_ptr + row * k + place, mask=inside_list, other=0)
        if logprobs_or_ranks_ptr.dtype.element_ty == tl.int16:
            rank = rank.to(tl.int32) & 0xFFFF
        own = words + tl.load(classes_ptr + row).to(tl.int32) * length
        at = tl.where(rank < length, own + rank, rank - length)
        ids = tl.load(lookup_ptr + at, mask=inside_list, other=-1).to(tl.int64)
    else:
        ids = tl.load(ids_or_gaps_ptr + row * k + place, mask=place < k, other=-1).to(tl.int64)
        given = tl.load(logprobs_or_ranks_ptr + row * k + place, mask=place < k, other=0.0)
    named = ids >= 0
    # A word beyond the head is the caller's mistake, which `debug` names; it touches no other row.
    here = named & (ids < width)

    # The student's logits at the teacher's words and at the label: z at temperature 1, x = z / T.
    raw_named = tl.load(logits + ids, mask=here, other=0.0).to(tl.float32)
    z, slope = cap(raw_named, softcap, CAPPED)
    x = tl.where(here, z * cold, FAR_BELOW)
    label, z_label, slope_label = -1, 0.0, 1.0
    if HARD:
        label = tl.load(labels_ptr + row).to(tl.int64)
        labelled = (label >= 0) & (label < width)
        raw_label = tl.load(logits + label, mask=labelled, other=0.0).to(tl.float32)
        z_label, slope_label = cap(raw_label, softcap, CAPPED)
    tl.debug_barrier()
    tl.store(logits + ids, float("-inf"), mask=here)
    tl.debug_barrier()

    # First pass: log-sum-exp of the words outside, in x and where asked in z.
    z_peak, total, plain_total = tail_sums(logits, width, bits, softcap, CAPPED, PLAIN, BLOCK_V)
    peak, plain_peak = z_peak * cold, z_peak

    # Log-probabilities of the outcomes, relative to the largest logit.
    total = tl.where(total > 0, total, 1.0)
    top = tl.maximum(tl.max(x, 0), peak)
    log_tail = peak - top + tl.log(total)
    log_sum = tl.log(tl.sum(tl.exp(x - top), 0) + tl.exp(log_tail))
    log_q = tl.maximum(x - top - log_sum, LOG_ZERO)
    log_q_tail = tl.maximum(log_tail - log_sum, LOG_ZERO)
    q, q_tail = tl.exp(log_q), tl.exp(log_q_tail)

    # The teacher's outcomes.
    log_p = tl.where(named, tl.maximum(given, LOG_ZERO), LOG_ZERO)
    mass = tl.sum(tl.where(named, tl.exp(log_p.to(tl.float64)), 0.0), 0)
    count = tl.sum(named.to(tl.int32), 0)
    has_tail = (TAIL != "truncate") & (count < width) & (count > 0)
    rest = 0.0
    if TAIL == "renormalise":
        log_p -= tl.log(tl.maximum(mass, 1e-300)).to(tl.float32)
    if TAIL == "bucket":
        rest = tl.maximum(1.0 - mass, 0.0).to(tl.float32)
    log_p_tail = tl.maximum(tl.log(tl.maximum(rest, 1e-37)), LOG_ZERO)
    log_p_tail = tl.where(rest > 0, log_p_tail, LOG_ZERO)
    p = tl.where(named, tl.exp(log_p), 0.0)
    p_tail = tl.where(has_tail, rest, 0.0)
    q_named = tl.where(named, q, 0.0)
    q_counted = tl.where(has_tail, q_tail, 0.0)

    # Values and slopes of the divergence.
    head = 0.0
    if DIVERGENCE == "adaptive_kl":
        gap = tl.abs(p - q_named)
        in_head = (tl.cumsum(p, 0) <= HEAD_MASS) | (place == 0)
        gaps = tl.sum(gap, 0) + tl.abs(p_tail - q_counted)
        head = tl.where(gaps > 0, tl.sum(tl.where(in_head, gap, 0.0), 0) / gaps, 0.5)
    value, r = terms(log_p, log_p, p, log_q, q_named, beta, alpha, head, DIVERGENCE)
    floored = tl.maximum(log_p_tail, LOG_TAIL_FLOOR)
    value_tail, r_tail = terms(
        log_p_tail, floored, p_tail, log_q_tail, q_counted, beta, alpha, head, DIVERGENCE
    )
    loss = temperature * temperature * (tl.sum(value, 0) + value_tail)

    # Cross-entropy.
    hard = 0.0
    plain_scale = 0.0
    if HARD:
        hard = tl.where(label >= 0, ce_weight, 0.0)
        # Beyond the words: the caller's mistake, which `debug` names; loss and gradient show it.
        hard = tl.where(label < width, hard, float("nan"))
        if PLAIN:
            z_named = tl.where(here, z, FAR_BELOW)
            plain_top = tl.maximum(tl.max(z_named, 0), plain_peak)
            plain_total = plain_total * tl.exp(plain_peak - plain_top)
            plain_total += tl.sum(tl.exp(z_named - plain_top), 0)
            surprise = plain_top - z_label + tl.log(plain_total)
            plain_peak = plain_top
            plain_scale = hard / plain_total
        else:
            surprise = top - z_label + log_sum
        surprise = tl.where(hard > 0, surprise, hard)
        loss += hard * surprise
        tl.store(told_ptr + row, surprise)
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(weights_ptr + row).to(tl.float32)
    tl.store(loss_ptr + row, loss * weight)

    if GRADIENT:
        # The most probable outcome's slope is shifted to 0: see divergences.outcome_gradient.
        best = tl.argmax(q, 0)
        q_best = tl.max(q, 0)
        tail_is_top = q_tail > q_best
        r_best = tl.sum(tl.where(place == best, r, 0.0), 0)
        shift = tl.where(tail_is_top, r_tail / q_tail, r_best / q_best)
        r = tl.where((place == best) & (not tail_is_top), 0.0, r - q * shift)
        r_tail = tl.where(tail_is_top, 0.0, r_tail - q_tail * shift)
        r = tl.where(named, r, 0.0)
        r_sum = tl.sum(r, 0) + r_tail
        inside = (r - q * r_sum) * temperature
        outside = (r_tail - q_tail * r_sum) * temperature
        if HARD and not PLAIN:
            inside += q * hard
            outside += q_tail * hard
        scale = weight * outside / total
        plain_scale = weight * plain_scale

        # Second pass: the gradient of the words outside; those inside hold exp(-inf) = 0.
        # At T = 1 the largest logit may be that of a word inside.
        plain_factor = 0.0
        if PLAIN:
            plain_factor = plain_scale * tl.exp(z_peak - plain_peak)
        write_tail(
            logits, width, bits, softcap, z_peak, scale, plain_factor, CAPPED, PLAIN, BLOCK_V
        )
        tl.debug_barrier()

        # The words inside, and a label that is not among them.
        inside *= weight
        if HARD:
            if PLAIN:
                inside += plain_scale * tl.exp(z - plain_peak)
            inside -= tl.where(ids == label, hard * weight, 0.0)
            at_label = scale * tl.exp(z_label * cold - peak) - hard * weight
            if PLAIN:
                at_label += plain_scale * tl.exp(z_label - plain_peak)
            alone = labelled & (tl.sum((ids == label).to(tl.int32), 0) == 0)
            at_label = (at_label * slope_label).to(buffer.dtype.element_ty)
            tl.store(logits + label, at_label, mask=alone)
        tl.store(logits + ids, (inside * slope).to(buffer.dtype.element_ty), mask=here)
