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
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportAssignmentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from stillroom.pipeline.kernels import dense_sweep, divergences
from stillroom.pipeline.kernels.dense_sweep import DenseTargets
from stillroom.pipeline.kernels.divergences import Objective
from stillroom.pipeline.kernels.triton.rows import (
    LN_2,
    LOG2_E,
    NUM_WARPS,
    add,
    block_of,
    cap,
    empty_sums,
    gathered,
    lane_sums,
    lanes_and_words,
    lanes_of,
    launch,
    load,
    per_load,
    store,
    terms,
)
from stillroom.pipeline.kernels.vocabulary_shards import FAR_BELOW as FAR
from stillroom.pipeline.kernels.vocabulary_shards import Shard

LOG_ZERO = tl.constexpr(divergences.LOG_ZERO)
FAR_BELOW = tl.constexpr(FAR)

BLOCK = 2048


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
    launch(
        _sweep_row,
        len(buffer),
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
        LOG2_E.value / objective.temperature,
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
    bits,
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
    PER: tl.constexpr = per_load(BLOCK_V, buffer.dtype.element_ty)
    LANES: tl.constexpr = lanes_of(BLOCK_V, buffer.dtype.element_ty)
    whole, words = width // BLOCK_V * BLOCK_V, tl.arange(0, BLOCK_V)
    row = (logits, teacher, width, bits, softcap, teacher_softcap)
    far, none = empty_sums(LANES)
    student = (far, tl.full((LANES,), 0, tl.int32), (far, none), (far, none))
    state = (student, (far, (far, none)))
    for start in range(0, whole, BLOCK_V):
        state = _add_words(
            state, row, start, LANES, PER, CAPPED, TEACHER_CAPPED, PLAIN, BLOCK_V, True
        )
    if whole < width:
        state = _add_words(
            state, row, whole, LANES, PER, CAPPED, TEACHER_CAPPED, PLAIN, BLOCK_V, False
        )
    (peaks, blocks, sums, plain_sums), (teacher_peaks, teacher_sums) = state
    peak, teacher_peak = tl.max(peaks, 0), tl.max(teacher_peaks, 0)
    total = gathered(sums, peak, bits)
    # log2 q = z bits - begin - left: the product is rounded, and what it lost is in the other.
    begin, teacher_begin = peak * bits, teacher_peak * bits
    left = tl.log2(total) - tl.fma(-peak, bits, begin)
    teacher_left = tl.log2(gathered(teacher_sums, teacher_peak, bits))
    teacher_left -= tl.fma(-teacher_peak, bits, teacher_begin)
    head = 0.0
    if DIVERGENCE == "adaptive_kl":
        head = tl.load(heads_ptr + number)

    # The most probable word's slope is shifted to 0: see divergences.outcome_gradient.
    first = tl.min(tl.where(peaks == peak, blocks, width), 0)
    best = _place_of(peak, logits, first, width, softcap, CAPPED, BLOCK_V)
    y_best, _bent = cap(tl.load(teacher + best).to(tl.float32), teacher_softcap, TEACHER_CAPPED)
    log_p, p_best = _log_and_power(y_best, bits, teacher_begin, teacher_left)
    log_q, q_best = _log_and_power(peak, bits, begin, left)
    _value, r_best = terms(log_p, log_p, p_best, log_q, q_best, beta, alpha, head, DIVERGENCE)
    lift = r_best / q_best

    # Second pass: the loss, and R.
    ends = (begin, left, teacher_begin, teacher_left, beta, alpha, head, best, lift)
    losses, slopes = none, none
    for start in range(0, whole, BLOCK_V):
        _z, _slope, _q, value, r = _slopes(
            row, ends, start + words, DIVERGENCE, CAPPED, TEACHER_CAPPED, True
        )
        losses += lane_sums(value, LANES, PER)
        slopes += lane_sums(r, LANES, PER)
    if whole < width:
        _z, _slope, _q, value, r = _slopes(
            row, ends, whole + words, DIVERGENCE, CAPPED, TEACHER_CAPPED, False
        )
        losses += lane_sums(value, LANES, PER)
        slopes += lane_sums(r, LANES, PER)
    loss = temperature * temperature * tl.sum(losses, 0)

    # Cross-entropy.
    label, hard = -1, 0.0
    if HARD:
        label = tl.load(labels_ptr + number).to(tl.int32)
        labelled = (label >= 0) & (label < width)
        raw_label = tl.load(logits + label, mask=labelled, other=0.0).to(tl.float32)
        z_label, _bent = cap(raw_label, softcap, CAPPED)
        hard = tl.where(label >= 0, ce_weight, 0.0)
        hard = tl.where(label < width, hard, float("nan"))
        if PLAIN:
            total = gathered(plain_sums, peak, LOG2_E)
        surprise = peak - z_label + tl.log(total)
        surprise = tl.where(hard > 0, surprise, hard)
        loss += hard * surprise
        tl.store(told_ptr + number, surprise)
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(weights_ptr + number).to(tl.float32)
    tl.store(loss_ptr + number, loss * weight)

    if GRADIENT:
        # All threads have loaded the label's logit and the best word's before any is overwritten.
        tl.debug_barrier()
        last = (tl.sum(slopes, 0), temperature, weight, hard, label, peak, total)
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
    state,
    row,
    start,
    LANES: tl.constexpr,
    PER: tl.constexpr,
    CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    PLAIN: tl.constexpr,
    BLOCK_V: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The first pass over a block."""
    (peaks, blocks, sums, plain_sums), (teacher_peaks, teacher_sums) = state
    logits, teacher, width, bits, softcap, teacher_softcap = row
    words = start + tl.arange(0, BLOCK_V)
    z, _ = load(logits, words, width, softcap, CAPPED, WHOLE)
    y, _bent = load(teacher, words, width, teacher_softcap, TEACHER_CAPPED, WHOLE)
    z, y = lanes_and_words(z, LANES, PER), lanes_and_words(y, LANES, PER)
    largest, teacher_largest = tl.max(tl.max(z, 2), 0), tl.max(tl.max(y, 2), 0)
    blocks = tl.where(largest > peaks, start, blocks)
    if PLAIN:
        plain_sums = add(plain_sums, z, largest, LOG2_E)
    student = (tl.maximum(peaks, largest), blocks, add(sums, z, largest, bits), plain_sums)
    teacher_sums = add(teacher_sums, y, teacher_largest, bits)
    return student, (tl.maximum(teacher_peaks, teacher_largest), teacher_sums)


@triton.jit
def _log_and_power(z, bits, begin, left):
    """log q and q of words whose logits are z."""
    in_bits = tl.maximum(tl.fma(z, bits, -begin) - left, LOG_ZERO * LOG2_E)
    return in_bits * LN_2, tl.exp2(in_bits)


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
    logits, teacher, width, bits, softcap, teacher_softcap = row
    begin, left, teacher_begin, teacher_left, beta, alpha, head, best, lift = ends
    z, slope = load(logits, words, width, softcap, CAPPED, WHOLE)
    y, _bent = load(teacher, words, width, teacher_softcap, TEACHER_CAPPED, WHOLE)
    log_q, q = _log_and_power(z, bits, begin, left)
    log_p, p = _log_and_power(y, bits, teacher_begin, teacher_left)
    value, r = terms(log_p, log_p, p, log_q, q, beta, alpha, head, DIVERGENCE)
    return z, slope, q, value, tl.where(words == best, 0.0, r - q * lift)


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
    total_slope, temperature, weight, hard, label, peak, plain_total = last
    gradient = (r - q * total_slope) * temperature
    if HARD:
        if PLAIN:
            gradient += hard * tl.exp(z - peak) / plain_total
        else:
            gradient += hard * q
        gradient -= tl.where(words == label, hard, 0.0)
    store(row[0], words, gradient * slope * weight, row[2], WHOLE)


@triton.jit
def _place_of(peak, logits, start, width, softcap, CAPPED: tl.constexpr, BLOCK_V: tl.constexpr):
    """The first word of a block whose logit is the peak."""
    word = start + tl.arange(0, BLOCK_V)
    z, _ = load(logits, word, width, softcap, CAPPED, False)
    return tl.min(tl.where((z == peak) & (word < width), word, width - 1), 0)
