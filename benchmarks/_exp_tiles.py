"""A trial, not used by the product: the divergence without a sweep over the logits.

One idea: off the teacher's words the gradient of a row is one number times exp(x), so the logits'
product can store exp(x - peak of its tile) at once, and the number, times the tile's own scale, is
applied inside the two products that follow: to the accumulators of d_hidden, to the states in
d_head. In between only the k words of a row and the tiles they lie in are touched again. ADR 0100
has the arithmetic, and why nothing imports this before a GPU has shown it faster.

Forward KL, and every other divergence of k words and a tail; no cross-entropy, cap, bias or shards.
A word more than 150 powers of two below its tile's largest counts as if it lay at that distance.
"""
# Triton's values have no types.
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from stillroom.pipeline.kernels.divergences import Objective
from stillroom.pipeline.kernels.targets import Targets
from stillroom.pipeline.kernels.torch_sweep import judge
from stillroom.pipeline.kernels.triton.rows import LN_2, LOG2_E, launch
from stillroom.pipeline.kernels.vocabulary_shards import FAR_BELOW as FAR
from stillroom.pipeline.kernels.vocabulary_shards import Shard, ShardStatistics

FAR_BELOW = tl.constexpr(FAR)
LEAST_SCALE = tl.constexpr(1e-30)
"""Of a tile: what its words' own gradients are divided by must not be 0."""
BLOCKS = {"BLOCK_R": 128, "BLOCK_V": 128, "BLOCK_D": 64}
"""Rows, words and columns of a tile."""


def divergence(
    hidden: Tensor, head: Tensor, targets: Targets, objective: Objective, blocks=BLOCKS
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [N] and the gradients of their sum with respect to hidden [N, D] and head [V, D]."""
    shard, (rows, depth), words = Shard.whole(len(head)), hidden.shape, len(head)
    block_r, block_v, block_d = blocks.values()
    tiles = triton.cdiv(words, block_v)
    powers = torch.empty(rows, tiles * block_v, dtype=hidden.dtype, device=hidden.device)
    tables = torch.empty(3, rows, tiles, dtype=torch.float32, device=hidden.device)
    peaks, sums, scales = tables
    sizes, bits = (rows, words, depth, tiles), LOG2_E.value / objective.temperature
    grid = triton.cdiv(rows, block_r) * tiles
    launch(_tiles, grid, hidden, head, powers, peaks, sums, *sizes, bits, **blocks)

    columns = shard.columns(targets.ids).contiguous()
    lists = columns, columns.shape[1], words, tiles
    options = {
        "BLOCK_K": triton.next_power_of_2(columns.shape[1]),
        "BLOCK_T": triton.next_power_of_2(tiles),
        "BLOCK_V": block_v,
    }
    support = torch.empty(columns.shape, dtype=torch.float32, device=hidden.device)
    ends = torch.empty(2, rows, 1, dtype=torch.float32, device=hidden.device)
    launch(_take_out, rows, powers, peaks, sums, support, ends[0], ends[1], *lists, **options)
    none = torch.full_like(ends[0], FAR)
    verdict = judge(targets, objective, shard, ShardStatistics(support, *ends, none))
    inside, outside = verdict.inside.contiguous(), (verdict.outside / ends[1]).contiguous()
    launch(_put_back, rows, powers, peaks, scales, ends[0], outside, inside, *lists, **options)

    of_hidden, of_head = torch.empty_like(hidden), torch.empty_like(head)
    parts = triton.cdiv(depth, block_d)
    grid = triton.cdiv(rows, block_r) * parts
    launch(_of_hidden, grid, powers, head, scales, of_hidden, *sizes, **blocks)
    launch(_of_head, tiles * parts, powers, hidden, scales, of_head, *sizes, **blocks)
    return verdict.loss, of_hidden, of_head


@triton.jit
def _tiles(
    hidden,
    head,
    powers,
    peaks_ptr,
    sums_ptr,
    rows,
    words,
    depth,
    tiles,
    bits,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile of 2^(bits z - peak), the peak of each of its rows, and the row's sum."""
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    word = (tile * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int64)
    z = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    for start in range(0, depth, BLOCK_D):
        at = start + tl.arange(0, BLOCK_D)
        left_mask = (row < rows)[:, None] & (at < depth)[None, :]
        right_mask = (word < words)[None, :] & (at < depth)[:, None]
        left = tl.load(hidden + row[:, None] * depth + at[None, :], mask=left_mask, other=0.0)
        right = tl.load(head + word[None, :] * depth + at[:, None], mask=right_mask, other=0.0)
        z = tl.dot(left, right, z, input_precision="ieee")
    x = tl.where((word < words)[None, :], z * bits, float("-inf"))
    peak = tl.maximum(tl.max(x, 1), FAR_BELOW)
    power = tl.exp2(x - peak[:, None])
    place = powers + row[:, None] * (tiles * BLOCK_V) + word[None, :]
    tl.store(place, power.to(powers.dtype.element_ty), mask=(row < rows)[:, None])
    tl.store(peaks_ptr + row * tiles + tile, peak, mask=row < rows)
    tl.store(sums_ptr + row * tiles + tile, tl.sum(power, 1), mask=row < rows)


@triton.jit
def _take_out(
    powers,
    peaks_ptr,
    sums_ptr,
    support_ptr,
    peak_ptr,
    total_ptr,
    columns_ptr,
    k,
    words,
    tiles,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A row's statistics: x of its k words, which become 0, and the sum of all others, of which
    only the tiles that held a word are added up again."""
    row = tl.program_id(0).to(tl.int64)
    own = powers + row * (tiles * BLOCK_V)
    place = tl.arange(0, BLOCK_K)
    column = tl.load(columns_ptr + row * k + place, mask=place < k, other=words)
    here = column < words
    power = tl.load(own + column, mask=here, other=1.0).to(tl.float32)
    base = tl.load(peaks_ptr + row * tiles + column // BLOCK_V, mask=here, other=0.0)
    x = (base + tl.maximum(tl.log2(power), -150.0)) * LN_2
    tl.store(support_ptr + row * k + place, tl.where(here, x, FAR_BELOW), mask=place < k)
    tl.debug_barrier()
    tl.store(own + column, tl.zeros((BLOCK_K,), powers.dtype.element_ty), mask=here)
    tl.debug_barrier()
    for word in range(k):
        tile = tl.load(columns_ptr + row * k + word) // BLOCK_V
        word_of = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        left = tl.load(own + word_of, mask=word_of < tiles * BLOCK_V, other=0.0)
        tl.store(sums_ptr + row * tiles + tile, tl.sum(left.to(tl.float32), 0), mask=tile < tiles)
    tl.debug_barrier()
    tile = tl.arange(0, BLOCK_T)
    total = tl.load(sums_ptr + row * tiles + tile, mask=tile < tiles, other=0.0)
    peak = tl.load(peaks_ptr + row * tiles + tile, mask=tile < tiles, other=FAR_BELOW)
    largest = tl.max(tl.where(total > 0, peak, FAR_BELOW), 0)
    total = tl.sum(tl.where(total > 0, total * tl.exp2(peak - largest), 0.0), 0)
    tl.store(peak_ptr + row, tl.where(total > 0, largest * LN_2, FAR_BELOW))
    tl.store(total_ptr + row, tl.where(total > 0, total, 1.0))


@triton.jit
def _put_back(
    powers,
    peaks_ptr,
    scales_ptr,
    peak_ptr,
    outside_ptr,
    inside_ptr,
    columns_ptr,
    k,
    words,
    tiles,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """What each of a row's tiles is to be multiplied by, and its k words' gradients over that."""
    row = tl.program_id(0).to(tl.int64)
    own, scales = powers + row * (tiles * BLOCK_V), scales_ptr + row * tiles
    tile, place = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K)
    peak = tl.load(peaks_ptr + row * tiles + tile, mask=tile < tiles, other=FAR_BELOW)
    apart = tl.minimum(peak - tl.load(peak_ptr + row) * LOG2_E, 126.0)
    scale = tl.load(outside_ptr + row) * tl.exp2(apart)
    scale = tl.where(tl.abs(scale) < LEAST_SCALE, LEAST_SCALE, scale)
    tl.store(scales + tile, scale, mask=tile < tiles)
    tl.debug_barrier()
    column = tl.load(columns_ptr + row * k + place, mask=place < k, other=words)
    here = column < words
    inside = tl.load(inside_ptr + row * k + place, mask=here, other=0.0)
    inside = inside / tl.load(scales + column // BLOCK_V, mask=here, other=1.0)
    tl.store(own + column, inside.to(powers.dtype.element_ty), mask=here)


@triton.jit
def _of_hidden(
    powers,
    head,
    scales_ptr,
    out,
    rows,
    words,
    depth,
    tiles,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """d_hidden: each tile's product is scaled by rows as it is added."""
    parts = tl.cdiv(depth, BLOCK_D)
    row = (tl.program_id(0) // parts * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    at = tl.program_id(0) % parts * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for tile in range(tiles):
        word = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        place = powers + row[:, None] * (tiles * BLOCK_V) + word[None, :]
        left = tl.load(place, mask=(row < rows)[:, None], other=0.0)
        mask = (word < words)[:, None] & (at < depth)[None, :]
        right = tl.load(head + word.to(tl.int64)[:, None] * depth + at[None, :], mask, other=0.0)
        scale = tl.load(scales_ptr + row * tiles + tile, mask=row < rows, other=0.0)
        total += scale[:, None] * tl.dot(left, right, input_precision="ieee")
    mask = (row < rows)[:, None] & (at < depth)[None, :]
    tl.store(out + row[:, None] * depth + at[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _of_head(
    powers,
    hidden,
    scales_ptr,
    out,
    rows,
    words,
    depth,
    tiles,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """d_head: the tile's scales go to the states, which are fewer than its powers."""
    parts = tl.cdiv(depth, BLOCK_D)
    tile = tl.program_id(0) // parts
    word = (tile * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int64)
    at = tl.program_id(0) % parts * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_V, BLOCK_D), tl.float32)
    for start in range(0, rows, BLOCK_R):
        row = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        place = powers + row[None, :] * (tiles * BLOCK_V) + word[:, None]
        left = tl.load(place, mask=(row < rows)[None, :], other=0.0)
        mask = (row < rows)[:, None] & (at < depth)[None, :]
        states = tl.load(hidden + row[:, None] * depth + at[None, :], mask=mask, other=0.0)
        scale = tl.load(scales_ptr + row * tiles + tile, mask=row < rows, other=0.0)
        right = (states.to(tl.float32) * scale[:, None]).to(hidden.dtype.element_ty)
        total = tl.dot(left, right, total, input_precision="ieee")
    mask = (word < words)[:, None] & (at < depth)[None, :]
    tl.store(out + word[:, None] * depth + at[None, :], total.to(out.dtype.element_ty), mask=mask)
