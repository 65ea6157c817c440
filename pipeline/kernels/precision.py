"""How precisely numbers are added up: in float32, or in float64 where the inputs are.

One idea: half precision is for products alone, and whoever hands in float64 wants to tell a wrong
sum from a rounded one, so nothing narrows it.
"""

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over values of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_full(like: Tensor) -> torch.autocast:
    """Within it products keep their factors' dtype, which autocast would narrow."""
    return torch.autocast(like.device.type, enabled=False)


def widened(tensor: Tensor) -> Tensor:
    """The tensor in the dtype of its sums."""
    return tensor.to(wide(tensor.dtype))
