"""The GPU sweep: every logit signal of a row, its tail draws included, in one Triton program.

One idea: the algorithm of `sweep_cpu` with a program per row. A first pass over the row keeps the
maxima of its parts, moments and the token's rank; the (k+1)-th largest maximum bounds the few words
that can be among the top k, and a bisection over their sort keys cuts them exactly. With the top k
taken out, a second pass sums exponentials of the tail at every temperature (the z-score log-sum-exp
is one more), relative to the tail's own peak, and keeps the mass of each part, in which the draws
are then searched. `torch.topk` would sort 64-bit keys, eight bytes a logit, and read the row five
times more; here only a part that holds a candidate is read again.

Barriers stand where one thread's stores are another's loads. `definition.sweep` is what this file
is tested against. Importing this module imports Triton.
"""
# Triton's values have no types.
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

from functools import cache

import torch
import triton
import triton.language as tl

from stillroom.pipeline.teacher.rows import RowSpec
from stillroom.pipeline.teacher.sweep.gpu_loops import (
    HIGHEST,
    LOWEST,
    ROUNDING,
    SELECT,
    accumulate,
    cut_of,
    key_of,
    keys_of,
    ordered,
    ordered_inverse,
    search,
    store_runs,
    uniform,
)

BLOCK, NUM_WARPS = 2048, 8
"""Words that a program has in registers at a time, and its warps."""
MANY_DRAWS, REGISTERS = 256, 128
"""From this many draws on, a limit above what is needed keeps ptxas from spilling a few bytes to
reach a higher occupancy."""
LARGEST_PART = 128
"""Words of a part: what a candidate search skips whole and a draw searches word by word."""
NEAR = 4096
"""Candidates for the top k that a row may list; where there are more (many equal logits, say) the
bisection reads the whole row instead."""


def sweep_triton(
    logits: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor, key: int, spec: RowSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as `definition.sweep`, for logits on a GPU; rows may be strided.

    A row with a NaN or infinite logit gets NaN in all of its floats.
    """
    num_rows, vocab_size = logits.shape
    device = logits.device
    ints = torch.empty((num_rows, spec.int_columns), dtype=torch.int32, device=device)
    floats = torch.empty((num_rows, spec.float_columns), dtype=torch.float32, device=device)
    if num_rows:
        options = launch_options(vocab_size, spec)
        parts = num_parts(vocab_size, options["PART"])
        _sweep_row[(num_rows,)](
            logits if logits.stride(1) == 1 else logits.contiguous(),
            logits.stride(0) if logits.stride(1) == 1 else vocab_size,
            targets,
            positions,
            key,
            _inverses(spec.temperatures, device),
            ints,
            floats,
            torch.empty((num_rows, parts), dtype=torch.float32, device=device),  # masses
            torch.empty((num_rows, parts), dtype=torch.float64, device=device),  # cdf
            torch.empty((num_rows, NEAR), dtype=torch.int32, device=device),  # near
            torch.empty((num_rows, options["BLOCK_K"]), dtype=torch.int64, device=device),  # top
            vocab_size,
            parts,
            1 << (parts.bit_length() - 1),  # the first jump of a binary search
            **options,
        )
    return ints, floats


def launch_options(vocab_size: int, spec: RowSpec) -> dict[str, int]:
    """Compile-time constants of the kernel, its warps and its registers."""
    limit = {"maxnreg": REGISTERS} if spec.draws >= MANY_DRAWS else {}
    return {
        "K": spec.k,
        "BLOCK_K": triton.next_power_of_2(max(spec.k, 1)),
        "DRAWS": spec.draws,
        "BLOCK_D": triton.next_power_of_2(max(spec.draws, 1)),
        "TEMPERATURES": len(spec.temperatures),
        "ONE": spec.temperatures.index(1.0),
        "BLOCK_T": triton.next_power_of_2(len(spec.temperatures)),
        "ENTROPY": spec.entropy,
        "MOMENTS": spec.moments,
        "BLOCK": BLOCK,
        "PART": part_size(vocab_size, spec.k),
        "NEAR": NEAR,
        "num_warps": NUM_WARPS,
        "enable_fp_fusion": True,
        **limit,
    }


def part_size(vocab_size: int, k: int) -> int:
    """A power of two that leaves the vocabulary at least 2 (k + 1) parts, if any does."""
    part = LARGEST_PART
    while part > 1 and vocab_size < 2 * (k + 1) * part:
        part //= 2
    return part


def num_parts(vocab_size: int, part: int) -> int:
    """Parts of a row, with those that pad its last block."""
    return triton.cdiv(vocab_size, BLOCK) * (BLOCK // part)


def scratch_bytes_per_row(vocab_size: int, k: int) -> int:
    """Memory beside the logits that a row needs while it is swept."""
    parts = num_parts(vocab_size, part_size(vocab_size, k))
    # Bytes of masses and cdf, of near, of top.
    return 12 * parts + 4 * NEAR + 8 * triton.next_power_of_2(max(k, 1))


@cache
def _inverses(temperatures: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """1 / T of every temperature but 1, in order: float32."""
    others = [1 / t for t in temperatures if t != 1.0]
    return torch.tensor(others or [1.0], dtype=torch.float32, device=device)


@triton.jit(do_not_specialize=["key"])
def _sweep_row(
    logits_ptr,
    stride,
    targets_ptr,
    positions_ptr,
    key,
    inverses_ptr,
    ints_ptr,
    floats_ptr,
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
    PART: tl.constexpr,
    NEAR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + row * stride
    masses, cdf = masses_ptr + row * parts, cdf_ptr + row * parts
    near, top = near_ptr + row * NEAR, top_ptr + row * BLOCK_K
    ints = ints_ptr + row * (K + 2 * DRAWS + 1)
    floats = floats_ptr + row * (K + 2 + TEMPERATURES + ENTROPY + 3 * MOMENTS)
    place, part = tl.arange(0, BLOCK), tl.arange(0, BLOCK // PART)
    lane, lane_k = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K)

    # First pass: the maxima of the parts (kept where masses will be), moments, the token's rank.
    token = tl.load(logits + tl.load(targets_ptr + row)).to(tl.float32)
    shift = tl.load(logits).to(tl.float32)
    above = tl.zeros((BLOCK,), tl.int32)
    offsets, squares = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    maxima = tl.full((BLOCK // PART,), float("-inf"), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        ids = start + place
        z = tl.load(logits + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
        largest = tl.max(tl.reshape(z, (BLOCK // PART, PART)), 1)
        tl.store(masses + start // PART + part, largest)
        maxima = tl.maximum(maxima, largest)
        above += (z > token).to(tl.int32)
        offset = tl.where(ids < vocab_size, z - shift, 0.0)
        offsets += offset
        squares += offset * offset
    peak = tl.max(maxima, 0)
    rank = 1 + tl.sum(above, 0)
    offset = tl.sum(offsets.to(tl.float64), 0) / vocab_size
    variance = tl.sum(squares.to(tl.float64), 0) / vocab_size - offset * offset
    mean, std = shift + offset, tl.sqrt(tl.maximum(variance, 0.0))
    bad = (offset - offset) != 0.0  # a NaN or an infinity is in the row
    poison = tl.where(bad, float("nan"), 0.0)
    tl.debug_barrier()

    # The top k: words whose sort key is `cut` or more, and the tail's largest logit.
    cut = tl.full((), HIGHEST, tl.int64)
    tail_peak = peak
    top_z = tl.full((BLOCK_K,), float("-inf"), tl.float32)
    if K > 0:
        bound = cut_of(masses, near, 0, parts, K + 1) >> 32  # one more than K: the tail's peak too
        count = tl.full((), 0, tl.int32)
        for start in range(0, vocab_size, BLOCK):
            largest = tl.load(masses + start // PART + part)
            if tl.max(ordered(largest), 0) >= bound:
                ids = start + place
                z = tl.load(logits + ids, mask=ids < vocab_size, other=0.0).to(tl.float32)
                chosen = (ordered(z) >= bound) & (ids < vocab_size)
                slot = count + tl.cumsum(chosen.to(tl.int32), 0) - 1
                tl.store(near + slot, ids, mask=chosen & (slot < NEAR))
                count += tl.sum(chosen.to(tl.int32), 0)
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
        tl.store(ints + lane_k, tl.where(bad, 0, top_ids), mask=lane_k < K)

    # Second pass: sums of exponentials of the tail, relative to its peak.
    others = TEMPERATURES - 1
    inverse = tl.load(inverses_ptr + lane, mask=lane < others, other=0.0)
    scale = 1e-7 + std
    if MOMENTS:
        inverse = tl.where(lane == others, (1.0 / scale).to(tl.float32), inverse)
    tail_masses = tl.zeros((BLOCK // PART,), tl.float64)
    products = tl.zeros((BLOCK,), tl.float32)
    sums = tl.zeros((BLOCK_T,), tl.float64)
    for start in range(0, vocab_size, BLOCK):
        ids = start + place
        z = tl.load(logits + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
        gone = (key_of(z, ids) >= cut) | (ids >= vocab_size)
        x = tl.where(gone, float("-inf"), z - tail_peak)
        mass = tl.exp(x)
        part_mass = tl.sum(tl.reshape(mass, (BLOCK // PART, PART)), 1)
        tail_masses += part_mass.to(tl.float64)
        if DRAWS > 0:
            tl.store(masses + start // PART + part, part_mass)
        if ENTROPY:
            products += tl.where(gone, 0.0, mass * x)
        if others + MOMENTS > 0:
            sums += tl.sum(tl.exp(x[None, :] * inverse[:, None]), 1).to(tl.float64)
    tail = tl.sum(tail_masses, 0)

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
        tl.store(floats + K + 2 + lane + (lane >= ONE), lse, mask=lane < others)
        if MOMENTS:
            spread = floats + K + 2 + TEMPERATURES + ENTROPY
            zscore = tl.sum(tl.where(lane == others, log_sums, 0.0), 0) + (peak - mean) / scale
            tl.store(spread, (mean + poison).to(tl.float32))
            tl.store(spread + 1, (std + poison).to(tl.float32))
            tl.store(spread + 2, (zscore + poison).to(tl.float32))
    if ENTROPY:
        weighted = faint * (tl.sum(products.to(tl.float64), 0) + tail * gap)
        weighted = tl.where(faint > 0, weighted, 0.0)
        weighted += tl.sum(tl.where(lane_k < K, exact * x, 0.0), 0)
        entropy = log_total - weighted / total
        tl.store(floats + K + 2 + TEMPERATURES, (entropy + poison).to(tl.float32))
    tl.store(ints + K + 2 * DRAWS, tl.where(bad, 0, rank))

    if DRAWS > 0:
        tl.debug_barrier()
        accumulate(masses, cdf, parts)
        draw = tl.arange(0, BLOCK_D)
        counter = (tl.load(positions_ptr + row).to(tl.int64) << 10) + 1
        count = tl.ceil(DRAWS * (tail * faint / total) - ROUNDING)
        count = tl.where(bad, 1.0, tl.minimum(tl.maximum(count, 1.0), DRAWS))
        point = (uniform(key, counter) + draw) / count * tail
        points = tl.where(draw < count, point, float("inf"))
        tl.debug_barrier()
        drawn = search(points, logits, cdf, cut, tail_peak, vocab_size, parts, half, BLOCK_D, PART)
        store_runs(tl.where(bad, 0, drawn), draw, draw < count, near, ints + K, DRAWS)
