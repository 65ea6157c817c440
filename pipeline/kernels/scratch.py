"""Memory for a chunk's buffer, which lives for one call.

One idea: a large block is given back to the system after every call, and on a CPU the next call
pays for each of its 4 KiB pages anew (2 us: a twentieth of a whole divergence at 512 x 256 x
32,000); Linux hands out 2 MiB at a time where a program asks for that. What is written there, and
memory that outlives a call, is somebody else's business.
"""

import mmap
from contextlib import suppress

import torch
from torch import Tensor

LARGE_PAGE = 2**21
"""Bytes of a large page on x86-64."""


def rows_of(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[rows, columns], undefined; in large pages on a CPU where it fills one and there are such."""
    size = rows * columns * dtype.itemsize
    if device.type == "cpu" and size >= LARGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without large pages, or no memory: torch says so better
            return torch.frombuffer(_in_large_pages(size), dtype=dtype, count=rows * columns).view(
                rows, columns
            )
    return torch.empty(rows, columns, dtype=dtype, device=device)


def _in_large_pages(size: int) -> mmap.mmap:
    """An area of its own, which goes back to the system with the last tensor over it."""
    whole = -(-size // LARGE_PAGE) * LARGE_PAGE
    area = mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_HUGEPAGE)
    return area
