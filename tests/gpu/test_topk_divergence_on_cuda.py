"""The contract of the divergences on a real GPU: every implementation, Triton compiled."""

import importlib.util
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from stillroom.pipeline.kernels.linear_divergence import linear_divergence
from stillroom.pipeline.kernels.topk_divergence import topk_divergence
from tests.contract.packed_cases import made_up

FILES = (
    "test_topk_divergence.py",
    "test_packed_topk.py",
    "test_linear_divergence.py",
    "test_cross_entropy_beside.py",
)
CONTRACT = [Path(__file__).parent.parent / "contract" / name for name in FILES]


@pytest.mark.gpu
def test_the_contract_holds_on_cuda():
    environment = os.environ | {
        "STILLROOM_TEST_DEVICE": "cuda",
        "STILLROOM_TEST_KERNELS": "eager chunked triton",
    }
    # Most of the time goes into compiling some two hundred variants of the kernels.
    parallel = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", *parallel, *map(str, CONTRACT)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout


def plain_lists(hidden, head, **options):
    logprobs, ids = torch.randn(300, 5003, device="cuda").log_softmax(1).topk(64, 1)
    return partial(topk_divergence, hidden, head, ids, logprobs, **options)


def packed_rows(hidden, head, **options):
    return partial(topk_divergence, hidden, head, made_up(300, 5003, 64).to("cuda"), **options)


def dense_teacher(hidden, head, **options):
    states = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16)
    teacher = torch.randn(5003, 256, device="cuda", dtype=torch.bfloat16)
    return partial(linear_divergence, hidden, head, states, teacher, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize("kind", [plain_lists, packed_rows, dense_teacher])
def test_the_hot_path_never_synchronises(kind, impl):
    hidden = torch.randn(300, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    head = torch.randn(5003, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights = torch.rand(300, device="cuda")
    loss = kind(hidden, head, weights=weights, impl=impl)

    def step():
        (loss().sum() / 300).backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_extra_memory_stays_within_the_budget(impl):
    """bf16, V = 151,936: one chunk's buffers, the head's gradient, and little else."""
    rows, width, words, k = 4096, 512, 151_936, 64
    hidden = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    head = torch.randn(words, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids = torch.stack([torch.randperm(words, device="cuda")[:k] for _ in range(rows)])
    logprobs = torch.full((rows, k), -8.0, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    budget = 2**28
    loss = topk_divergence(hidden, head, ids, logprobs, impl=impl, memory_budget=budget)
    loss.sum().backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= budget + head.nbytes + hidden.nbytes + 2**26


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", [plain_lists, packed_rows, dense_teacher])
def test_a_head_on_another_device_than_the_current_one(kind):
    torch.manual_seed(0)
    hidden = torch.randn(300, 128, device="cuda:0", dtype=torch.bfloat16)
    head = torch.randn(5003, 128, device="cuda:0", dtype=torch.bfloat16)
    loss = kind(hidden, head, impl="triton")

    def moved(value):
        return value.to("cuda:1") if hasattr(value, "to") else value

    keywords = {name: moved(value) for name, value in loss.keywords.items()}
    found = loss.func(*map(moved, loss.args), **keywords)
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(found.to("cuda:0"), loss(), rtol=0, atol=0)
