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
from stillroom.pipeline.kernels.triton.rows import add, block_of, cap, load, store, terms
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
    return {"BLOCK_V": block_of(BLOCK, width), "num_warps": NUM_WARPS, "enable_fp_fusion": True}


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
    number = tl.program_id(0).to(tl.int64)
    logits = buffer + number * stride
    teacher = teacher_buffer + number * teacher_stride

    # First pass: log-sum-exps of x = z / T, of the teacher's y, and where asked of z; and the block
    # of the student's most probable word. Whole blocks have no mask: see `rows.load`.
    whole, words = width // BLOCK_V * BLOCK_V, tl.arange(0, BLOCK_V)
    row = (logits, teacher, width, cold, softcap, teacher_softcap)
    far, none = tl.full((), FAR_BELOW, tl.float32), tl.full((), 0.0, tl.float32)
    sums = (far, none, far, none, far, none, tl.full((), 0, tl.int32))
    for start in range(0, whole, BLOCK_V):
        sums = _add_words(sums, row, start, words, CAPPED, TEACHER_CAPPED, PLAIN, True)
    if whole < width:
        sums = _add_words(sums, row, whole, words, CAPPED, TEACHER_CAPPED, PLAIN, False)
    peak, total, teacher_peak, teacher_total, plain_peak, plain_total, best_block = sums
    log_total, log_teacher_total = tl.log(total), tl.log(teacher_total)
    head = 0.0
    if DIVERGENCE == "adaptive_kl":
        head = tl.load(heads_ptr + number)

    # The most probable word's slope is shifted to 0: see divergences.outcome_gradient.
    best = _place_of(peak, logits, best_block, width, cold, softcap, CAPPED, BLOCK_V)
    y_best, _bent = cap(tl.load(teacher + best).to(tl.float32), teacher_softcap, TEACHER_CAPPED)
    log_p_best = tl.maximum(y_best * cold - teacher_peak - log_teacher_total, LOG_ZERO)
    p_best, q_best = tl.exp(log_p_best), tl.exp(-log_total)
    _, r_best = terms(
        log_p_best, log_p_best, p_best, -log_total, q_best, beta, alpha, head, DIVERGENCE
    )
    shift = r_best / q_best

    # Second pass: the loss, and R.
    ends = (peak, log_total, teacher_peak, log_teacher_total, beta, alpha, head, best, shift)
    losses = tl.full((BLOCK_V,), 0.0, tl.float32)
    slopes = tl.full((BLOCK_V,), 0.0, tl.float32)
    for start in range(0, whole, BLOCK_V):
        _z, _slope, _q, value, r = _slopes(
            row, ends, start + words, DIVERGENCE, CAPPED, TEACHER_CAPPED, True
        )
        losses, slopes = losses + value, slopes + r
    if whole < width:
        _z, _slope, _q, value, r = _slopes(
            row, ends, whole + words, DIVERGENCE, CAPPED, TEACHER_CAPPED, False
        )
        losses, slopes = losses + value, slopes + r
    loss = temperature * temperature * tl.sum(losses, 0)

    # Cross-entropy.
    label, hard = -1, 0.0
    if HARD:
        label = tl.load(labels_ptr + number).to(tl.int32)
        labelled = (label >= 0) & (label < width)
        raw_label = tl.load(logits + label, mask=labelled, other=0.0).to(tl.float32)
        z_label, _bent = cap(raw_label, softcap, CAPPED)
        hard = tl.where(label >= 0, ce_weight, 0.0)
        surprise = peak - z_label + log_total
        if PLAIN:
            surprise = plain_peak - z_label + tl.log(plain_total)
        surprise = tl.where(label >= 0, surprise, 0.0)
        loss += hard * surprise
        tl.store(told_ptr + number, surprise)
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(weights_ptr + number).to(tl.float32)
    tl.store(loss_ptr + number, loss * weight)

    if GRADIENT:
        # All threads have loaded the label's logit and the best word's before any is overwritten.
        tl.debug_barrier()
        last = (tl.sum(slopes, 0), temperature, weight, hard, label, plain_peak, plain_total)
        for start in range(0, whole, BLOCK_V):
            _write_words(
                row,
                ends,
                last,
                start + words,
                DIVERGENCE,
                HARD,
                PLAIN,
                CAPPED,
                TEACHER_CAPPED,
                True,
            )
        if whole < width:
            _write_words(
                row,
                ends,
                last,
                whole + words,
                DIVERGENCE,
                HARD,
                PLAIN,
                CAPPED,
                TEACHER_CAPPED,
                False,
            )


@triton.jit
def _add_words(
    sums,
    row,
    start,
    words,
    CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    PLAIN: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The first pass over a block."""
    peak, total, teacher_peak, teacher_total, plain_peak, plain_total, best_block = sums
    logits, teacher, width, cold, softcap, teacher_softcap = row
    z, _ = load(logits, start + words, width, softcap, CAPPED, WHOLE)
    y, _bent = load(teacher, start + words, width, teacher_softcap, TEACHER_CAPPED, WHOLE)
    before = peak
    peak, total = add(peak, total, z * cold)
    best_block = tl.where(peak > before, start, best_block)
    teacher_peak, teacher_total = add(teacher_peak, teacher_total, y * cold)
    if PLAIN:
        plain_peak, plain_total = add(plain_peak, plain_total, z)
    return peak, total, teacher_peak, teacher_total, plain_peak, plain_total, best_block


@triton.jit
def _slopes(
    row,
    ends,
    words,
    DIVERGENCE: tl.constexpr,
    CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Logits, the cap's slope, q, and of each word its share of the loss and its r, which is
    shifted so that the most probable word's is 0."""
    logits, teacher, width, cold, softcap, teacher_softcap = row
    peak, log_total, teacher_peak, log_teacher_total, beta, alpha, head, best, shift = ends
    z, slope = load(logits, words, width, softcap, CAPPED, WHOLE)
    y, _bent = load(teacher, words, width, teacher_softcap, TEACHER_CAPPED, WHOLE)
    log_q = tl.maximum(z * cold - peak - log_total, LOG_ZERO)
    log_p = tl.maximum(y * cold - teacher_peak - log_teacher_total, LOG_ZERO)
    p, q = tl.exp(log_p), tl.exp(log_q)
    value, r = terms(log_p, log_p, p, log_q, q, beta, alpha, head, DIVERGENCE)
    return z, slope, q, value, tl.where(words == best, 0.0, r - q * shift)


@triton.jit
def _write_words(
    row,
    ends,
    last,
    words,
    DIVERGENCE: tl.constexpr,
    HARD: tl.constexpr,
    PLAIN: tl.constexpr,
    CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The last pass over a block: gradients in the place of logits."""
    z, slope, q, _value, r = _slopes(row, ends, words, DIVERGENCE, CAPPED, TEACHER_CAPPED, WHOLE)
    total_slope, temperature, weight, hard, label, plain_peak, plain_total = last
    gradient = (r - q * total_slope) * temperature
    if HARD:
        if PLAIN:
            gradient += hard * tl.exp(z - plain_peak) / plain_total
        else:
            gradient += hard * q
        gradient -= tl.where(words == label, hard, 0.0)
    store(row[0], words, gradient * slope * weight, row[2], WHOLE)


@triton.jit
def _place_of(x, logits, start, width, cold, softcap, CAPPED: tl.constexpr, BLOCK_V: tl.constexpr):
    """The first word of a block whose logit over T is x."""
    word = start + tl.arange(0, BLOCK_V)
    z, _ = load(logits, word, width, softcap, CAPPED, False)
    return tl.min(tl.where((z * cold == x) & (word < width), word, width - 1), 0)
