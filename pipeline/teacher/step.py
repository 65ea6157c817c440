"""The scored rows of one engine step: those of all its requests as one batch.

One idea: a step holds pieces of many prompts, and what is fixed per call (a short matrix product, a
wait for the device, a copy) is paid once a step: the rows go through the head in full blocks, and
everything that they said comes to the host in one journey, through pinned memory, with one wait.
On a CPU a block ends where its request ends, so that a request's sums do not depend on what else
the step holds. This module knows no engine; a request's own bookkeeping is its engine's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stillroom.pipeline.teacher.rows import RowSpec
from stillroom.pipeline.teacher.sweep.blocks import score_rows


@dataclass(frozen=True, slots=True)
class Share:
    """What one request has in a step.

    Attributes:
        key: of its draws, see `rows.draw_key`.
        shift: from a position of its prompt to the row of the step's states.
        first, stop: positions to score: first .. stop - 1, at least one.
        targets: int64 [stop - first], the tokens that follow; on the host or on the device.
        kept: int [P], positions whose states are kept.
    """

    key: int
    shift: int
    first: int
    stop: int
    targets: Tensor
    kept: np.ndarray


Said = tuple[Tensor, Tensor, Tensor]
"""ints [R, I] and floats [R, F] (see `rows`), and the kept states [P, layers, H], on the host."""


def score_step(
    spec: RowSpec,
    shares: Sequence[Share],
    hidden: Tensor,
    states: Sequence[Tensor],
    logits_fn: Callable[[Tensor], Tensor],
    block_rows: int,
    across: bool,
) -> list[Tensor]:
    """Score all shares of a step; nothing here waits for the device.

    Args:
        hidden: [n, H], the step's states that the LM head reads.
        states: [n, H] of each layer that is kept.
        logits_fn, block_rows, across: see `score_rows`.

    Returns:
        ints, floats and kept states of all shares, one after another, on the device.
    """
    device = hidden.device
    positions = np.concatenate([np.arange(share.first, share.stop) for share in shares])
    lengths = [share.stop - share.first for share in shares]
    rows = positions + np.repeat([share.shift for share in shares], lengths)
    kept = np.concatenate([share.kept + share.shift for share in shares])
    keys = np.repeat(np.array([share.key for share in shares], dtype=np.int64), lengths)
    numbers = np.concatenate([rows, positions, keys, kept]).astype(np.int64)
    cuts = [*([len(rows)] * 3), len(kept)]
    rows_there, positions_there, keys_there, kept_there = on_device(numbers, device).split(cuts)

    def take(first: int, last: int) -> Tensor:
        if rows[last - 1] - rows[first] == last - 1 - first:  # rising, so without a gap
            return hidden[rows[first] : rows[last - 1] + 1]
        return hidden.index_select(0, rows_there[first:last])

    targets = on_device(torch.cat([share.targets for share in shares]), device)
    asked = targets, positions_there, keys_there, logits_fn, block_rows, across
    ints, floats = score_rows(spec, lengths, take, *asked)
    chosen = [state.index_select(0, kept_there.to(state.device)) for state in states]
    if chosen:
        return [ints, floats, torch.stack(chosen, 1)]
    return [ints, floats, hidden.new_empty((len(kept), 0, 0))]


def by_share(shares: Sequence[Share], tensors: Sequence[Tensor]) -> list[Said]:
    """What each share said, on the host: see `on_host`."""
    ints, floats, states = on_host(tensors)
    lengths = [share.stop - share.first for share in shares]
    kept = [len(share.kept) for share in shares]
    return list(zip(ints.split(lengths), floats.split(lengths), states.split(kept)))


def on_device(values: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """The same there, without a wait: from pinned memory, where that is a journey."""
    given = torch.as_tensor(values)
    if given.device == device or device.type == "cpu":
        return given.to(device)
    return given.pin_memory().to(device, non_blocking=True)


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same on the host: copies into pinned memory one behind another, and one wait."""
    device = tensors[0].device
    if device.type == "cpu":
        return list(tensors)
    pinned = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
    for there, here in zip(tensors, pinned):
        here.copy_(there, non_blocking=True)
    torch.accelerator.current_stream(device).synchronize()
    return pinned
