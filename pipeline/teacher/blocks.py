"""From hidden states to rows in bounded memory: the LM head and the sweep, block by block.

One idea: the block is as many rows as the memory bound allows, so [rows, vocabulary] never exists
for a whole prompt; which sweep reads the block is decided by where the logits live.
"""

from collections.abc import Callable

import torch

from pipeline.teacher.rows import RowSpec
from pipeline.teacher.sweep import sweep

PLAIN_BYTES_PER_LOGIT = 40
"""Temporaries of `sweep.sweep` for each logit: fp32 copies, int64 sort keys, fp64 weights."""


def score_block(
    spec: RowSpec,
    key: int,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    first_row: int,
    logits_fn: Callable[[torch.Tensor], torch.Tensor],
    scratch_bytes: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Signals of consecutive rows.

    Args:
        hidden: [R, H], what the LM head reads.
        targets: int64 [R], the tokens that follow.
        first_row: row index of `hidden[0]` in its example.
        logits_fn: [r, H] -> logits [r, V]; a collective under tensor parallelism, so every rank
            calls it equally often.
        scratch_bytes: bound on logits and temporaries; one row is always scored.

    Returns:
        (ints, floats), see `rows`.
    """
    done = []
    start, step = 0, 1
    while start < len(hidden):
        stop = min(start + step, len(hidden))
        logits = logits_fn(hidden[start:stop])
        positions = torch.arange(first_row + start, first_row + stop, device=logits.device)
        done.append(sweep(logits, targets[start:stop], positions, key, spec))
        start, step = stop, rows_within(scratch_bytes, logits)
    ints, floats = zip(*done)
    return torch.cat(ints), torch.cat(floats)


def rows_within(scratch_bytes: int, logits: torch.Tensor) -> int:
    """Rows whose logits and temporaries fit the bound."""
    per_logit = logits.element_size() + PLAIN_BYTES_PER_LOGIT
    return max(1, scratch_bytes // (per_logit * logits.shape[1]))
