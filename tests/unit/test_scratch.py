"""Memory of a chunk's buffer: the same tensor whether it lies in large pages or not."""

import gc
import mmap

import pytest
import torch

from stillroom.pipeline.kernels import scratch

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 1500])
def test_it_is_a_tensor_like_any_other(rows, dtype):
    found = scratch.rows_of(rows, 1024, dtype, CPU)
    assert found.shape == (rows, 1024)
    assert found.dtype == dtype
    assert found.is_contiguous()
    found.fill_(3)
    assert bool((found == 3).all())


def test_a_part_of_it_keeps_the_memory():
    last = scratch.rows_of(1024, 1024, torch.float32, CPU).fill_(5)[-1:]
    gc.collect()
    assert last.sum() == 5 * 1024


def test_a_system_without_large_pages_gives_ordinary_ones(monkeypatch):
    def refused(size):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(scratch, "_in_large_pages", refused)
    assert scratch.rows_of(1024, 1024, torch.float32, CPU).shape == (1024, 1024)
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert scratch.rows_of(1024, 1024, torch.float32, CPU).shape == (1024, 1024)
