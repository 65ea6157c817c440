"""The GPU sweep: every logit signal of a row, its tail draws included, in one Triton program.

One idea: the host's side of it, which is the scratch memory of a row, and the constants that the
program in `gpu_program` is compiled with, out of vocabulary and signals. `definition.sweep` is what
both are tested against. Importing this module imports Triton.
"""

from functools import cache, partial

import torch
import triton

from stillroom.pipeline.kernels.triton.rows import (
    NUM_WARPS,
    block_of,
    launch,
    registers,
    rest_of,
)
from stillroom.pipeline.teacher.rows import RowSpec
from stillroom.pipeline.teacher.sweep.gpu_program import sweep_row

BLOCK, SMALL_BLOCK, MANY_TEMPERATURES = 4096, 2048, 5
"""Words that a program has in registers at a time: two loads of 16 bytes in flight in a thread, or
one where each word has so many exponentials that they would not fit the registers of two."""
REGISTERS, MANY_REGISTERS = 128, 255
"""Of a thread: a limit above what most need keeps ptxas from spilling a few bytes to reach a higher
occupancy. Two blocks of a multiprocessor have 128; with many temperatures one block fits."""
MOST_BLOCKS = 8
"""Blocks of which a lane's words are one part, what a candidate search skips whole."""
PART = 128
"""Neighbouring words whose mass is one number, which the search of a draw skips whole."""
NEAR = 4096
"""Candidates for the top k that a row may list; where there are more (many equal logits, say) the
bisection reads the whole row instead."""


def sweep_triton(
    logits: torch.Tensor,
    targets: torch.Tensor,
    positions: torch.Tensor,
    key: int | torch.Tensor,
    spec: RowSpec,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as `definition.sweep`, for logits on a GPU; rows may be strided.

    A row with a NaN or infinite logit gets NaN in all of its floats.
    """
    num_rows, vocab_size = logits.shape
    device = logits.device
    ints = torch.empty((num_rows, spec.int_columns), dtype=torch.int32, device=device)
    floats = torch.empty((num_rows, spec.float_columns), dtype=torch.float32, device=device)
    if num_rows:
        given = logits if logits.stride(1) == 1 else logits.contiguous()
        options = launch_options(vocab_size, spec, given.dtype)
        parts = num_masses(vocab_size, options["BLOCK"])
        scratch = partial(torch.empty, device=device)
        keys = key if isinstance(key, torch.Tensor) else torch.full_like(positions, key)
        launch(
            sweep_row,
            num_rows,
            given,
            given.stride(0),
            targets,
            positions,
            keys,
            _inverses(spec.temperatures, device),
            ints,
            floats,
            scratch((num_rows, options["PARTS"]), dtype=torch.float32),  # maxima
            scratch((num_rows, parts), dtype=torch.float32),  # masses
            scratch((num_rows, parts), dtype=torch.float64),  # cdf
            scratch((num_rows, NEAR + options["PARTS"]), dtype=torch.int32),  # near
            scratch((num_rows, options["BLOCK_K"]), dtype=torch.int64),  # top
            vocab_size,
            parts,
            1 << (parts.bit_length() - 1),  # the first jump of a binary search
            instead="set STILLROOM_SWEEP=torch, which needs no Triton",
            **options,
        )
    return ints, floats


def launch_options(vocab_size: int, spec: RowSpec, dtype: torch.dtype) -> dict[str, int]:
    """Compile-time constants of the kernel, its warps and its registers."""
    many = len(spec.temperatures) >= MANY_TEMPERATURES
    block = block_of(SMALL_BLOCK if many else BLOCK, vocab_size)
    per = min(16 // dtype.itemsize, rest_of(block))
    lanes = min(32 * NUM_WARPS, rest_of(block) // per)
    blocks = blocks_of_a_part(vocab_size // block, lanes, spec.k)
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
        "BLOCK": block,
        "LANES": lanes,
        "PER": per,
        "BLOCKS": blocks,
        "PARTS": triton.next_power_of_2(lanes * (triton.cdiv(vocab_size // block, blocks) + 1)),
        "PART": min(PART, block),
        "NEAR": NEAR,
        "num_warps": NUM_WARPS,
        "enable_fp_fusion": True,
        **registers(MANY_REGISTERS if many else REGISTERS),
    }


def blocks_of_a_part(blocks: int, lanes: int, k: int) -> int:
    """Blocks of which a lane's words are one part: few enough that a row has 2 (k + 1) parts, if
    it can, so that little more than k words reach the (k + 1)-th largest of their maxima."""
    return max(1, min(MOST_BLOCKS, blocks * lanes // (2 * (k + 1))))


def num_masses(vocab_size: int, block: int) -> int:
    """Masses that a row keeps, with those that pad its end."""
    part, rest, whole = min(PART, block), rest_of(block), vocab_size // block * block
    return whole // part + triton.cdiv(vocab_size - whole, rest) * (rest // part)


def scratch_bytes_per_row(vocab_size: int, spec: RowSpec) -> int:
    """Memory beside the logits that a row needs while it is swept, where these are bfloat16."""
    options = launch_options(vocab_size, spec, torch.bfloat16)
    masses = num_masses(vocab_size, options["BLOCK"])
    # Bytes of masses and cdf, of maxima and near, of top.
    return 12 * masses + 8 * options["PARTS"] + 4 * NEAR + 8 * options["BLOCK_K"]


@cache
def _inverses(temperatures: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """1 / T of every temperature but 1, in order: float32."""
    others = [1 / t for t in temperatures if t != 1.0]
    return torch.tensor(others or [1.0], dtype=torch.float32, device=device)
