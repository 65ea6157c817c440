"""From hidden states to rows in bounded memory: the LM head and the sweep, block by block.

One idea: a block is as many rows as the memory bound allows and the caches like, so [rows,
vocabulary] never exists for a whole prompt; which sweep reads it follows from where the logits lie.
"""

from collections.abc import Callable

import torch

from pipeline.teacher.rows import RowSpec
from pipeline.teacher.sweep import sweep

CPU_ROWS = 128
"""Enough rows for the head's matrix product to be efficient, few enough to stay in cache."""
BYTES_PER_LOGIT = {"cpu": 6, "other": 44}
"""Logits in at most float32 and their temporaries: `sweep_cpu` widens row by row, `sweep` makes
float32 copies, int64 sort keys and float64 weights."""


def score_block(
    spec: RowSpec,
    key: int,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    first_row: int,
    logits_fn: Callable[[torch.Tensor], torch.Tensor],
    block_rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Signals of consecutive rows.

    Args:
        hidden: [R, H], what the LM head reads.
        targets: int64 [R], the tokens that follow.
        first_row: row index of `hidden[0]` in its example.
        logits_fn: [r, H] -> logits [r, V]; a collective under tensor parallelism, so every rank
            calls it equally often.
        block_rows: rows to score at a time, see `rows_within`.

    Returns:
        (ints, floats), see `rows`.
    """
    done = []
    for start in range(0, len(hidden), block_rows):
        logits = logits_fn(hidden[start : start + block_rows])
        positions = torch.arange(start, start + len(logits), device=logits.device) + first_row
        target = targets[start : start + len(logits)]
        done.append(sweep_of(logits)(logits, target, positions, key, spec))
    ints, floats = zip(*done)
    return torch.cat(ints), torch.cat(floats)


def rows_within(scratch_bytes: int, vocab_size: int, device: str) -> int:
    """Rows whose logits and temporaries fit the bound; at least one."""
    per_logit = BYTES_PER_LOGIT.get(device, BYTES_PER_LOGIT["other"])
    fitting = max(1, scratch_bytes // (per_logit * vocab_size))
    return min(fitting, CPU_ROWS) if device == "cpu" else fitting


def sweep_of(logits: torch.Tensor) -> Callable:
    """The fastest sweep for where these logits are."""
    if logits.device.type != "cpu":
        return sweep
    from pipeline.teacher.sweep_cpu import sweep_cpu

    return sweep_cpu
