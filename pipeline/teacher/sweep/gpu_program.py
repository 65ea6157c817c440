"""The program of the GPU sweep: one a row, in Triton.

One idea: the algorithm of `sweep_cpu`, a row at a time. A first pass over the row keeps the
maxima of its parts, moments and the token's rank; the (k+1)-th largest maximum bounds the few words
that can be among the top k, only the parts that reach it are read again, and a bisection over their
sort keys cuts exactly. With the top k taken out, a second pass sums exponentials of the tail at
every temperature (the z-score log-sum-exp is one more), relative to the tail's own peak, and keeps
the mass of every 128 words, in which the draws are then searched. Threads add up for themselves
and meet once a row. `torch.topk` would sort 64-bit keys, eight bytes a logit, and read the row five
times more.

Barriers stand where one thread's stores are another's loads. `definition.sweep` is what this file
is tested against. Importing this module imports Triton.
"""
# Triton's values have no types.
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportAssignmentType=false

import triton
import triton.language as tl

from stillroom.pipeline.kernels.triton.rows import (
    LN_2,
    LOG2_E,
    lanes_and_words,
    rest_of,
)
from stillroom.pipeline.teacher.sweep.gpu_loops import (
    HIGHEST_32,
    LOWEST,
    ROUNDING,
    SELECT,
    accumulate,
    cut_of,
    keys_of,
    list_parts,
    list_words,
    note,
    ordered_inverse,
    search,
    store_runs,
    uniform,
    weigh,
)


@triton.jit
def sweep_row(
    logits_ptr,
    stride,
    targets_ptr,
    positions_ptr,
    keys_ptr,
    inverses_ptr,
    ints_ptr,
    floats_ptr,
    maxima_ptr,
    masses_ptr,
    cdf_ptr,
    near_ptr,
    top_ptr,
    vocab_size,
    parts,
    half,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DRAWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TEMPERATURES: tl.constexpr,
    ONE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ENTROPY: tl.constexpr,
    MOMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    PER: tl.constexpr,
    BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    NEAR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + row * stride
    maxima, masses, cdf = maxima_ptr + row * PARTS, masses_ptr + row * parts, cdf_ptr + row * parts
    near, top = near_ptr + row * (NEAR + PARTS), top_ptr + row * BLOCK_K
    ints = ints_ptr + row * (K + 2 * DRAWS + 1)
    floats = floats_ptr + row * (K + 2 + TEMPERATURES + ENTROPY + 3 * MOMENTS)
    lane, lane_k, lane_t = tl.arange(0, LANES), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_T)
    REST: tl.constexpr = rest_of(BLOCK)
    STRETCH: tl.constexpr = BLOCKS * BLOCK
    whole = vocab_size // BLOCK * BLOCK
    groups = tl.cdiv(whole, STRETCH)

    # First pass: the maxima of the parts, which are a lane's words in a stretch of blocks, moments,
    # the token's rank. Whole blocks have no mask: see `kernels.triton.rows.load`.
    token = tl.load(logits + tl.load(targets_ptr + row)).to(tl.float32)
    origin = tl.load(logits).to(tl.float32)
    none, lowest = tl.zeros((LANES,), tl.float32), tl.full((LANES,), float("-inf"), tl.float32)
    peaks, sums = lowest, (tl.zeros((LANES,), tl.int32), none, none)
    for first in range(0, whole, STRETCH):
        state = (lowest, sums[0], sums[1], sums[2])
        for start in range(first, tl.minimum(first + STRETCH, whole), BLOCK):
            z = tl.load(logits + start + tl.arange(0, BLOCK)).to(tl.float32)
            z = lanes_and_words(z, LANES, PER)
            state = note(state, z, z, token, origin, MOMENTS, True)
        sums = (state[1], state[2], state[3])
        peaks = tl.maximum(peaks, state[0])
        if K > 0:
            tl.store(maxima + first // STRETCH * LANES + lane, state[0])
    state = (lowest, sums[0], sums[1], sums[2])
    for start in range(whole, vocab_size, REST):
        ids = start + tl.arange(0, REST)
        z = tl.load(logits + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
        inside = lanes_and_words(ids, LANES, PER) < vocab_size
        z = lanes_and_words(z, LANES, PER)
        state = note(state, z, inside, token, origin, MOMENTS, False)
    last_maxima, above, offsets, squares = state
    if K > 0:
        tl.store(maxima + groups * LANES + lane, last_maxima)
    peak = tl.max(tl.maximum(peaks, last_maxima), 0)
    rank = 1 + tl.sum(above, 0)
    offset = tl.sum(offsets.to(tl.float64), 0) / vocab_size
    variance = tl.sum(squares.to(tl.float64), 0) / vocab_size - offset * offset
    mean, std = origin + offset, tl.sqrt(tl.maximum(variance, 0.0))
    bad = (offset - offset) != 0.0  # a NaN or an infinity is in the row
    poison = tl.where(bad, float("nan"), 0.0)
    tl.debug_barrier()

    # The top k: words whose sort key is `cut` or more, and the tail's largest logit.
    cut_z, cut_id = float("inf"), -1
    tail_peak = peak
    top_z = tl.full((BLOCK_K,), float("-inf"), tl.float32)
    if K > 0:
        # One more than K: the tail's peak too.
        bound, num_listed = list_parts(maxima, near + NEAR, (groups + 1) * LANES, K + 1, PARTS)
        tl.debug_barrier()
        LOADS: tl.constexpr = STRETCH // (LANES * PER)
        count = list_words(
            logits,
            near + NEAR,
            num_listed,
            bound,
            near,
            groups,
            whole,
            vocab_size,
            NEAR,
            LANES,
            PER,
            LOADS,
        )
        tl.debug_barrier()
        listed = tl.where(count <= NEAR, count, 0)
        count = tl.where(count <= NEAR, count, vocab_size)
        cut = cut_of(logits, near, listed, count, K)
        found = tl.full((), 0, tl.int32)
        next_key = tl.full((), LOWEST, tl.int64)
        for start in range(0, count, SELECT):
            keys = keys_of(logits, near, listed, start, count)
            chosen = keys >= cut
            slot = found + tl.cumsum(chosen.to(tl.int32), 0) - 1
            tl.store(top + slot, keys, mask=chosen & (slot < K))
            found += tl.sum(chosen.to(tl.int32), 0)
            next_key = tl.maximum(next_key, tl.max(tl.where(chosen, LOWEST, keys), 0))
        tl.debug_barrier()
        kept = lane_k < tl.minimum(found, K)
        keys = tl.sort(tl.load(top + lane_k, mask=kept, other=LOWEST), descending=True)
        top_ids = (0x7FFFFFFF - (keys & 0xFFFFFFFF)).to(tl.int32)
        top_z = tl.load(logits + top_ids, mask=kept, other=float("-inf")).to(tl.float32)
        tail_peak = ordered_inverse((next_key >> 32).to(tl.int32))
        cut_z = ordered_inverse((cut >> 32).to(tl.int32))
        cut_z = tl.where(cut == LOWEST, float("-inf"), cut_z)
        cut_id = (0x7FFFFFFF - (cut & 0xFFFFFFFF)).to(tl.int32)
        # -1 would be -0.0, which counts as 0.0: all zeros lie above such a cut.
        cut_id = tl.where((cut >> 32) == -1, HIGHEST_32, cut_id)
        tl.store(ints + lane_k, tl.where(bad, 0, top_ids), mask=lane_k < K)

    # Second pass: sums of exponentials of the tail, relative to its peak, in powers of 2 (see
    # `kernels.triton.rows.add`); what rounding took from the peak is given back behind the loop.
    others = TEMPERATURES - 1
    inverse = tl.load(inverses_ptr + lane_t, mask=lane_t < others, other=0.0)
    scale = 1e-7 + std
    if MOMENTS:
        inverse = tl.where(lane_t == others, (1.0 / scale).to(tl.float32), inverse)
    begin = tail_peak * LOG2_E
    end = (cut_z, cut_id, begin)
    row_of = (logits, masses, inverse, vocab_size)
    state = (none, none, tl.zeros((BLOCK_T, LANES), tl.float32))
    for start in range(0, whole, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        state = weigh(
            state,
            row_of,
            end,
            ids,
            start,
            K,
            DRAWS,
            ENTROPY,
            others + MOMENTS,
            LANES,
            PER,
            PART,
            True,
        )
    for start in range(whole, vocab_size, REST):
        ids = start + tl.arange(0, REST)
        state = weigh(
            state,
            row_of,
            end,
            ids,
            start,
            K,
            DRAWS,
            ENTROPY,
            others + MOMENTS,
            LANES,
            PER,
            PART,
            False,
        )
    lost = tl.fma(-tail_peak, LOG2_E, begin)
    given = tl.exp2(lost).to(tl.float64)
    tail = tl.sum(state[0].to(tl.float64), 0)
    products = LN_2 * given * (tl.sum(state[1].to(tl.float64), 0) + lost.to(tl.float64) * tail)
    tail *= given
    sums = tl.sum(state[2].to(tl.float64), 1) * tl.exp2(lost * inverse).to(tl.float64)

    # What the row says, with the top k put back.
    gap = (tail_peak - peak).to(tl.float64)
    x = (top_z - peak).to(tl.float64)
    exact = tl.where(lane_k < K, tl.exp(x), 0.0)
    faint = tl.exp(gap)
    total = tl.sum(exact, 0) + tail * faint
    log_total = tl.log(total)
    if K > 0:
        tl.store(floats + lane_k, (x - log_total + poison).to(tl.float32), mask=lane_k < K)
    tl.store(floats + K, (tl.log(tail) + gap - log_total + poison).to(tl.float32))
    tl.store(floats + K + 1, (token - peak - log_total + poison).to(tl.float32))
    tl.store(floats + K + 2 + ONE, (peak + log_total + poison).to(tl.float32))
    if others + MOMENTS > 0:
        lifted = tl.exp((top_z - peak)[None, :] * inverse[:, None])
        lifted = tl.where((lane_k < K)[None, :], lifted, 0.0)
        cold = inverse.to(tl.float64)
        log_sums = tl.log(tl.sum(lifted.to(tl.float64), 1) + sums * tl.exp(gap * cold))
        lse = (peak * cold + log_sums + poison).to(tl.float32)
        tl.store(floats + K + 2 + lane_t + (lane_t >= ONE), lse, mask=lane_t < others)
        if MOMENTS:
            spread = floats + K + 2 + TEMPERATURES + ENTROPY
            zscore = tl.sum(tl.where(lane_t == others, log_sums, 0.0), 0) + (peak - mean) / scale
            tl.store(spread, (mean + poison).to(tl.float32))
            tl.store(spread + 1, (std + poison).to(tl.float32))
            tl.store(spread + 2, (zscore + poison).to(tl.float32))
    if ENTROPY:
        weighted = faint * (products + tail * gap)
        weighted = tl.where(faint > 0, weighted, 0.0)
        weighted += tl.sum(tl.where(lane_k < K, exact * x, 0.0), 0)
        entropy = log_total - weighted / total
        tl.store(floats + K + 2 + TEMPERATURES, (entropy + poison).to(tl.float32))
    tl.store(ints + K + 2 * DRAWS, tl.where(bad, 0, rank))

    if DRAWS > 0:
        tl.debug_barrier()
        total_mass = accumulate(masses, cdf, parts)
        draw = tl.arange(0, BLOCK_D)
        counter = (tl.load(positions_ptr + row).to(tl.int64) << 10) + 1
        count = tl.ceil(DRAWS * (tail * faint / total) - ROUNDING)
        count = tl.where(bad, 1.0, tl.minimum(tl.maximum(count, 1.0), DRAWS))
        point = (uniform(tl.load(keys_ptr + row), counter) + draw) / count * total_mass
        points = tl.where(draw < count, point, float("inf"))
        tl.debug_barrier()
        drawn = search(points, logits, cdf, end, vocab_size, parts, half, BLOCK_D, PART, K > 0)
        store_runs(tl.where(bad, 0, drawn), draw, draw < count, near, ints + K, DRAWS)
