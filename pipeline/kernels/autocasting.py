"""Autocast, asked about and switched off, on devices that have it and those that do not.

One idea: the fused path picks the dtype of its matrix products once, at its door, and then works
with explicit dtypes; `out=` products are not cast by autocast anyway.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def is_on(device: torch.device) -> bool:
    """Whether autocast is enabled for a device."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def dtype_of(tensor: Tensor) -> torch.dtype:
    """Dtype in which a matrix product with this tensor is to run."""
    if is_on(tensor.device) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(tensor.device.type)
    return tensor.dtype


def off(device: torch.device) -> AbstractContextManager:
    """Autocast switched off inside."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
