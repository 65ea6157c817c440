"""The sweep against a dense teacher as one Triton kernel: a program per row, three passes.

One idea: the teacher's logits of the chunk lie in a second buffer, made by one matrix product; a
program reads its row of both: once for their log-sum-exps, once for the loss and the one number
R = sum_v r_v, and once to overwrite the student's logits with r_v - q_v R. No program touches
another's row, and in the pass that stores, a thread stores what it alone has loaded. The formulas
are those of `divergences` and `topk_divergence` with every word in the list and no tail.

AKL's head needs the teacher's words in order; that share is made in torch, blocks of rows at a time
(`dense_sweep.head_shares`). Importing this module imports Triton.
"""
# Triton reads `if ... else` on constants as compile-time choices, and its values have no types.
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from stillroom.pipeline.kernels import dense_sweep, divergences
from stillroom.pipeline.kernels.dense_sweep import DenseTargets
from stillroom.pipeline.kernels.divergences import Objective
from stillroom.pipeline.kernels.triton.rows import add, cap, terms
from stillroom.pipeline.kernels.vocabulary_shards import FAR_BELOW as FAR
from stillroom.pipeline.kernels.vocabulary_shards import Shard

LOG_ZERO = tl.constexpr(divergences.LOG_ZERO)
FAR_BELOW = tl.constexpr(FAR)

NUM_WARPS, BLOCK = 8, 2048


def sweep(
    buffer: Tensor, targets: DenseTargets, objective: Objective, shard: Shard, with_gradient: bool
) -> Tensor:
    """Losses [C] of a chunk; `buffer` [C, width + spare] turns from raw logits into gradients.

    Args:
        buffer: fp32, bf16 or fp16; rows may be strided.
        targets: the teacher's states and head, labels and weights of these rows.
        objective: the loss of a row; its tail is not read.
        shard: must hold all words.
        with_gradient: False leaves the buffer as it is.
    """
    loss = torch.empty(len(buffer), dtype=torch.float32, device=buffer.device)
    if not len(buffer):
        return loss
    teacher = dense_sweep.raw_teacher_logits(targets, shard.width)
    hard = targets.labels is not None and objective.ce_weight > 0
    heads = loss
    if objective.divergence == "adaptive_kl":
        heads = dense_sweep.head_shares(buffer, teacher, targets, objective, shard.width)
    _sweep_row[(len(buffer),)](
        buffer,
        buffer.stride(0),
        teacher,
        teacher.stride(0),
        heads,
        targets.labels.contiguous() if targets.labels is not None else loss,
        loss if targets.weights is None else targets.weights.float().contiguous(),
        loss,
        targets.cross_entropy if targets.cross_entropy is not None else torch.empty_like(loss),
        shard.width,
        1 / objective.temperature,
        objective.temperature,
        objective.beta,
        objective.alpha,
        objective.ce_weight,
        objective.softcap or 1.0,
        targets.softcap or 1.0,
        DIVERGENCE=objective.divergence,
        HARD=hard,
        PLAIN=hard and objective.temperature != 1,
        WEIGHTED=targets.weights is not None,
        CAPPED=objective.softcap is not None,
        TEACHER_CAPPED=targets.softcap is not None,
        GRADIENT=with_gradient,
        **launch_options(shard.width),
    )
    return loss


def launch_options(width: int) -> dict[str, int]:
    """Block size and warps."""
    block = min(BLOCK, triton.next_power_of_2(width))
    return {"BLOCK_V": block, "num_warps": NUM_WARPS, "enable_fp_fusion": True}


@triton.jit
def _sweep_row(
    buffer,
    stride,
    teacher_buffer,
    teacher_stride,
    heads_ptr,
    labels_ptr,
    weights_ptr,
    loss_ptr,
    told_ptr,
    width,
    cold,
    temperature,
    beta,
    alpha,
    ce_weight,
    softcap,
    teacher_softcap,
    DIVERGENCE: tl.constexpr,
    HARD: tl.constexpr,
    PLAIN: tl.constexpr,
    WEIGHTED: tl.constexpr,
    CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits = buffer + row * stride
    teacher = teacher_buffer + row * teacher_stride

    # First pass: log-sum-exps of x = z / T, of the teacher's y, and where asked of z; and the block
    # of the student's most probable word.
    peak, total = tl.full((), FAR_BELOW, tl.float32), tl.full((), 0.0, tl.float32)
    plain_peak, plain_total, teacher_peak, teacher_total = peak, total, peak, total
    best_block = 0
    for start in range(0, width, BLOCK_V):
        z, slope = _load(logits, start, width, softcap, CAPPED, BLOCK_V)
        y, _bent = _load(teacher, start, width, teacher_softcap, TEACHER_CAPPED, BLOCK_V)
        before = peak
        peak, total = add(peak, total, z * cold)
        best_block = tl.where(peak > before, start, best_block)
        teacher_peak, teacher_total = add(teacher_peak, teacher_total, y * cold)
        if PLAIN:
            plain_peak, plain_total = add(plain_peak, plain_total, z)
    log_total, log_teacher_total = tl.log(total), tl.log(teacher_total)
    head = 0.0
    if DIVERGENCE == "adaptive_kl":
        head = tl.load(heads_ptr + row)

    # The most probable word's slope is shifted to 0: see divergences.outcome_gradient.
    best = _place_of(peak, logits, best_block, width, cold, softcap, CAPPED, BLOCK_V)
    y_best, _ = cap(tl.load(teacher + best).to(tl.float32), teacher_softcap, TEACHER_CAPPED)
    log_p_best = tl.maximum(y_best * cold - teacher_peak - log_teacher_total, LOG_ZERO)
    p_best, q_best = tl.exp(log_p_best), tl.exp(-log_total)
    _, r_best = terms(
        log_p_best, log_p_best, p_best, -log_total, q_best, beta, alpha, head, DIVERGENCE
    )
    shift = r_best / q_best

    # Second pass: the loss, and R.
    losses = tl.full((BLOCK_V,), 0.0, tl.float32)
    slopes = tl.full((BLOCK_V,), 0.0, tl.float32)
    for start in range(0, width, BLOCK_V):
        z, slope = _load(logits, start, width, softcap, CAPPED, BLOCK_V)
        y, _bent = _load(teacher, start, width, teacher_softcap, TEACHER_CAPPED, BLOCK_V)
        log_q = tl.maximum(z * cold - peak - log_total, LOG_ZERO)
        log_p = tl.maximum(y * cold - teacher_peak - log_teacher_total, LOG_ZERO)
        p, q = tl.exp(log_p), tl.exp(log_q)
        value, r = terms(log_p, log_p, p, log_q, q, beta, alpha, head, DIVERGENCE)
        losses += value
        if GRADIENT:
            word = start + tl.arange(0, BLOCK_V)
            slopes += tl.where(word == best, 0.0, r - q * shift)
    loss = temperature * temperature * tl.sum(losses, 0)

    # Cross-entropy.
    label, hard = -1, 0.0
    if HARD:
        label = tl.load(labels_ptr + row).to(tl.int32)
        labelled = (label >= 0) & (label < width)
        raw_label = tl.load(logits + label, mask=labelled, other=0.0).to(tl.float32)
        z_label, _slope = cap(raw_label, softcap, CAPPED)
        hard = tl.where(label >= 0, ce_weight, 0.0)
        surprise = peak - z_label + log_total
        if PLAIN:
            surprise = plain_peak - z_label + tl.log(plain_total)
        surprise = tl.where(label >= 0, surprise, 0.0)
        loss += hard * surprise
        tl.store(told_ptr + row, surprise)
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(weights_ptr + row).to(tl.float32)
    tl.store(loss_ptr + row, loss * weight)

    if GRADIENT:
        total_slope = tl.sum(slopes, 0)
        # All threads have loaded the label's logit and the best word's before any is overwritten.
        tl.debug_barrier()
        for start in range(0, width, BLOCK_V):
            z, slope = _load(logits, start, width, softcap, CAPPED, BLOCK_V)
            y, _bent = _load(teacher, start, width, teacher_softcap, TEACHER_CAPPED, BLOCK_V)
            log_q = tl.maximum(z * cold - peak - log_total, LOG_ZERO)
            log_p = tl.maximum(y * cold - teacher_peak - log_teacher_total, LOG_ZERO)
            p, q = tl.exp(log_p), tl.exp(log_q)
            value, r = terms(log_p, log_p, p, log_q, q, beta, alpha, head, DIVERGENCE)
            word = start + tl.arange(0, BLOCK_V)
            r = tl.where(word == best, 0.0, r - q * shift)
            gradient = (r - q * total_slope) * temperature
            if HARD:
                if PLAIN:
                    gradient += hard * tl.exp(z - plain_peak) / plain_total
                else:
                    gradient += hard * q
                gradient -= tl.where(word == label, hard, 0.0)
            gradient = (gradient * slope * weight).to(buffer.dtype.element_ty)
            tl.store(logits + word, gradient, mask=word < width)


@triton.jit
def _load(logits, start, width, softcap, CAPPED: tl.constexpr, BLOCK_V: tl.constexpr):
    """A block of capped logits, minus infinity beyond the vocabulary, and the cap's slope."""
    word = start + tl.arange(0, BLOCK_V)
    raw = tl.load(logits + word, mask=word < width, other=float("-inf")).to(tl.float32)
    bent, slope = cap(raw, softcap, CAPPED)
    return tl.where(raw == float("-inf"), raw, bent), slope


@triton.jit
def _place_of(x, logits, start, width, cold, softcap, CAPPED: tl.constexpr, BLOCK_V: tl.constexpr):
    """The first word of a block whose logit over T is x."""
    z, _ = _load(logits, start, width, softcap, CAPPED, BLOCK_V)
    word = start + tl.arange(0, BLOCK_V)
    return tl.min(tl.where((z * cold == x) & (word < width), word, width - 1), 0)
