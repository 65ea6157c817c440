"""From hidden states to rows in bounded memory: the LM head and the sweep, block by block.

One idea: a block is as many rows as the memory bound allows and the caches like, so [rows,
vocabulary] never exists for a whole step. Which sweep reads it follows from where the logits lie,
`sweep_cpu` on a CPU, `sweep_triton` on a GPU, `sweep` elsewhere, unless STILLROOM_SWEEP names one
(numba, triton or torch).
"""

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch

from stillroom.cache_schemas.errors import ConfigError, TeacherError
from stillroom.pipeline.teacher.rows import RowSpec
from stillroom.pipeline.teacher.sweep.definition import sweep

SweepName = Literal["numba", "triton", "torch"]
Sweep = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | int, RowSpec],
    tuple[torch.Tensor, torch.Tensor],
]
SWEEP_VARIABLE = "STILLROOM_SWEEP"
CPU_ROWS = 128
"""Enough rows for the head's matrix product to be efficient, few enough to stay in cache."""
TILE_ROWS = 128
"""What a tensor core's matrix product computes at a time, or divides."""
LARGE_CARD = 70 * 10**9
BYTES_PER_LOGIT = {"numba": 6, "triton": 0, "torch": 44}
"""Logits in at most float32 and their temporaries: `sweep_cpu` widens row by row, `sweep` makes
float32 copies, int64 sort keys and float64 weights. What the Triton sweep needs follows from the
logits' dtype: see `rows_within`."""
MOST_DIFFERENCE = 2.0**-16
"""What a float may be off by, for each unit of the largest exponent of its row (a logit over the
coldest temperature, and one): 256 roundings of fp32, which adds up what exponents round."""
MAGNITUDES = 1.0, 3.0, 10.0, 30.0


def score_rows(
    spec: RowSpec,
    lengths: Sequence[int],
    take: Callable[[int, int], torch.Tensor],
    targets: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    logits_fn: Callable[[torch.Tensor], torch.Tensor],
    block_rows: int,
    across: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Signals of R rows, of one request or of several.

    Args:
        lengths: rows of each request, in the rows' order.
        take: (first, last) -> [last - first, H], the states of those rows, which the head reads.
        targets: int64 [R], the tokens that follow.
        positions: int64 [R], of the rows in their examples.
        keys: int64 [R], of the draws.
        logits_fn: [r, H] -> logits [r, V]; a collective under tensor parallelism, so every rank
            calls it equally often.
        block_rows: rows to score at a time, see `rows_within`.
        across: a block may hold rows of several requests.

    Returns:
        (ints, floats), see `rows`.
    """
    done = []
    sweep_rows = sweep_of(targets.device.type)
    for first, last in _blocks([sum(lengths)] if across else lengths, block_rows):
        asked = targets[first:last], positions[first:last], keys[first:last]
        done.append(sweep_rows(logits_fn(take(first, last)), *asked, spec))
    ints, floats = zip(*done)
    return torch.cat(ints), torch.cat(floats)


def _blocks(lengths: Sequence[int], block_rows: int) -> Iterator[tuple[int, int]]:
    """(first row, row after the last) of blocks, which end where a length does."""
    start = 0
    for length in lengths:
        for first in range(start, start + length, block_rows):
            yield first, min(first + block_rows, start + length)
        start += length


def rows_within(
    scratch_bytes: int, vocab_size: int, device: str, spec: RowSpec, dtype: torch.dtype
) -> int:
    """Rows whose logits, of this dtype, and temporaries fit the bound; at least one.

    Off the CPU whole tiles of a matrix product, where there is room for one.
    """
    fitting = max(1, scratch_bytes // _bytes_of_row(vocab_size, device, spec, dtype))
    if device == "cpu":
        return min(fitting, CPU_ROWS)
    return fitting // TILE_ROWS * TILE_ROWS or fitting


def _bytes_of_row(vocab_size: int, device: str, spec: RowSpec, dtype: torch.dtype) -> int:
    name = sweep_name(device)
    if name != "triton":
        return BYTES_PER_LOGIT[name] * vocab_size
    from stillroom.pipeline.teacher.sweep.gpu import scratch_bytes_per_row

    # The logits, and once more: a head may copy (soft cap, gathering of ranks).
    return 2 * dtype.itemsize * vocab_size + scratch_bytes_per_row(vocab_size, spec)


def usual_scratch_bytes(card_bytes: int) -> int:
    """What logits may take, by the accelerator's memory; 0 on a CPU."""
    return 1 << 30 if card_bytes >= LARGE_CARD else 256 << 20


def sweep_name(device: str) -> SweepName:
    """Which sweep reads logits on a device: STILLROOM_SWEEP, or the fastest.

    Raises:
        ConfigError: the variable names none.
    """
    usual = {"cpu": "numba", "cuda": "triton" if _has_triton() else "torch"}.get(device, "torch")
    name = os.environ.get(SWEEP_VARIABLE, usual)
    if name not in BYTES_PER_LOGIT:
        raise ConfigError(
            f"no sweep is named '{name}'",
            expected=f"one of {', '.join(sorted(BYTES_PER_LOGIT))}",
            where=SWEEP_VARIABLE,
        )
    return name  # type: ignore[return-value]


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def sweep_of(device: str) -> Sweep:
    """The sweep that `sweep_name` names."""
    name = sweep_name(device)
    if name == "numba":
        from stillroom.pipeline.teacher.sweep.cpu import sweep_cpu

        return sweep_cpu
    if name == "triton":
        from stillroom.pipeline.teacher.sweep.gpu import sweep_triton

        return sweep_triton
    return sweep


def check_sweep(vocab_size: int, device: str, spec: RowSpec) -> None:
    """Refuse a device on which the sweep for it does not say what its definition says.

    Raises:
        TeacherError: names both values.
    """
    logits, targets = _rows_to_check(vocab_size, device)
    asked = (logits, targets, torch.arange(len(logits), device=device), 1, spec)
    (ints, floats), (true_ints, true_floats) = sweep_of(device)(*asked), sweep(*asked)
    exact = [*range(spec.k), spec.int_columns - 1]  # columns of the top ids and the rank
    allowed = MOST_DIFFERENCE * (1 + logits.float().abs().amax(1) / min(spec.temperatures))  # [R]
    gaps = (floats - true_floats).abs().amax(1)  # [R] nats, and logits of the moments
    worst = int((gaps / allowed).nan_to_num(torch.inf).argmax())
    gap, most = float(gaps[worst]), float(allowed[worst])
    ids_differ = int((ints[:, exact] != true_ints[:, exact]).sum())
    if not gap <= most or ids_differ > 0:
        raise TeacherError(
            f"the {sweep_name(device)} sweep is off by {gap:.3g} and in {ids_differ} ids",
            expected=f"at most {most:.3g} from its definition, and the same ids",
            where=device,
            remedy=f"Set {SWEEP_VARIABLE}=torch, and report this with your accelerator.",
        )


def _rows_to_check(vocab_size: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [R, V] as engines hand them over, bf16 rows of a wider buffer, from flat ones to
    peaked ones; and a token [R] of each."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor(MAGNITUDES)[:, None]
    wide = torch.randn(len(MAGNITUDES), vocab_size // 64 * 64 + 64, generator=generator) * scale
    targets = torch.randint(0, vocab_size, (len(MAGNITUDES),), generator=generator)
    return wide.bfloat16().to(device)[:, :vocab_size], targets.to(device)
