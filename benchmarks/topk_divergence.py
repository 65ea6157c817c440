"""Time, memory and gradient error of the top-k divergence beside its peers and the GEMM floor.

`python -m benchmarks.topk_divergence --json` measures this machine: on a CPU one problem in one
thread, on a CUDA GPU two problems, after the contract suite has passed there. All contenders do
forward and backward on the same tensors, one after another in every round, and the best round
counts; the floor is the three bare matrix products (logits, d_hidden, d_unembedding) into
memory that is there already. Extra memory is the peak above the inputs: on a CPU the process's
high-water mark in a process of its own, on a GPU the allocator's.

It needs torch, Triton (on a GPU) and numpy, and pytest and hypothesis for the contract; peers that
are not installed are rows marked `failed` on a GPU.
"""

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import _divergence_contenders as contenders
from benchmarks._divergence_contenders import Contender, Problem
from benchmarks.cache_trial import asking, keep, machine

PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy")
CPU_PROBLEM = {"n": 512, "d": 256, "v": 32_000, "k": 64}
CUDA_PROBLEMS = (
    {"n": 8192, "d": 4096, "v": 151_936, "k": 64},
    {"n": 8192, "d": 2048, "v": 151_936, "k": 64},
)
CONTRACT = "tests/gpu/test_topk_divergence_on_cuda.py"
LAUNCH_ROWS = 4096
ROWS_JUDGED = 64
"""Rows of the gradient check on a GPU, where fp64 logits of all rows would not fit."""


def main() -> None:
    """Measure, write `benchmarks/results/`, print."""
    parser = asking(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpu", action="store_true", help="measure the CPU where there is a GPU")
    parser.add_argument("--no-contract", action="store_true", help="on a GPU, measure at once")
    parser.add_argument("--no-write", action="store_true", help="leave benchmarks/results alone")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of is not None:
        print(_high_water(contenders.on_cpu()[arguments.memory_of]))
        return
    cuda = torch.cuda.is_available() and not arguments.cpu
    if cuda:
        result = measure_cuda(arguments.rounds, not arguments.no_contract)
    else:
        result = measure_cpu(arguments.rounds)
    result = result | surroundings(cuda)
    if not arguments.no_write:
        keep(f"topk_divergence-{'cuda' if cuda else 'cpu'}", result, datetime.now(UTC))
    print(json.dumps(result) if arguments.json else table(result))


def measure_cpu(rounds: int) -> dict[str, Any]:
    """One thread: process CPU time is then the work done, whoever else is on the machine."""
    torch.set_num_threads(1)
    problem = Problem.make(**CPU_PROBLEM, dtype=torch.float32, device="cpu")
    entrants = contenders.on_cpu()
    floor = floor_of(problem)
    calls = [floor, *(step_of(entrant, problem) for entrant in entrants)]
    clocks = best_of(rounds, calls, lambda: None)
    rows = []
    for place, (entrant, (seconds, cpu_seconds)) in enumerate(zip(entrants, clocks[1:])):
        row = describe(entrant, CPU_PROBLEM, "cpu", "float32")
        row |= {"seconds": seconds, "cpu_seconds": cpu_seconds}
        row["extra_peak_bytes"] = _extra_peak_in_a_process(place)
        row["grad_error"] = gradient_error(entrant, problem)
        rows.append(row)
    return {"rows": rows, "floor_seconds": clocks[0][0], "floor_cpu_seconds": clocks[0][1]}


def measure_cuda(rounds: int, contract: bool = True) -> dict[str, Any]:
    """The contract on this GPU, then every contender on every problem."""
    result: dict[str, Any] = {"contract": run_contract() if contract else "not run"}
    result["problems"] = []
    for sizes in CUDA_PROBLEMS:
        problem = Problem.make(**sizes, dtype=torch.bfloat16, device="cuda")
        rows = [_row_on_cuda(entrant, problem, sizes, rounds) for entrant in contenders.on_cuda()]
        clocks = {
            f"floor_{name}": min(row[f"floor_{name}"] for row in rows if "failed" not in row)
            for name in ("seconds", "cpu_seconds")
        }
        result["problems"].append({"rows": rows} | clocks)
        del problem
        _free()
    return result | result["problems"][0] | {"launches": time_launches(rounds)}


def _row_on_cuda(
    entrant: Contender, problem: Problem, sizes: dict[str, int], rounds: int
) -> dict[str, Any]:
    """One contender, its floor measured in the same rounds."""
    row = describe(entrant, sizes, "cuda", "bfloat16")
    try:
        if entrant.dense:
            problem.with_dense()
        step = step_of(entrant, problem)
        row["extra_peak_bytes"] = _allocated(step, problem)
        floor, own = best_of(rounds, [floor_of(problem), step], torch.cuda.synchronize)
        row |= {"floor_seconds": floor[0], "floor_cpu_seconds": floor[1]}
        row |= {"seconds": own[0], "cpu_seconds": own[1]}
        problem.dense = problem.hidden.grad = problem.head.grad = None
        _free()
        row["grad_error"] = gradient_error(entrant, problem.rows(ROWS_JUDGED))
    except Exception as error:  # Whatever a peer raises, the others are still measured.
        row["failed"] = f"{type(error).__name__}: {error}"[:300]
    problem.dense = problem.hidden.grad = problem.head.grad = None
    _truths.clear()
    _free()
    return row


def _allocated(step: Callable[[], None], problem: Problem) -> int:
    """Peak bytes above the inputs, after a first step warmed everything up."""
    step()
    problem.hidden.grad = problem.head.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def time_launches(rounds: int) -> list[dict[str, float]]:
    """Seconds of the sweep alone on a chunk of bf16 logits, for blocks and warps to choose by."""
    from stillroom.pipeline.kernels.divergences import Objective
    from stillroom.pipeline.kernels.targets import Targets
    from stillroom.pipeline.kernels.triton import sweep as triton_sweep
    from stillroom.pipeline.kernels.vocabulary_shards import Shard

    words, rows = CUDA_PROBLEMS[0]["v"], LAUNCH_ROWS
    logits = torch.randn(rows, words + 16, device="cuda", dtype=torch.bfloat16)
    logprobs, ids = torch.randn(rows, words, device="cuda").log_softmax(1).topk(64, 1)
    targets, found = Targets(ids, logprobs, None, None), []
    held = triton_sweep.PLAIN_BLOCK, triton_sweep.NUM_WARPS
    for block, warps in ((4096, 8), (8192, 8), (8192, 16), (16384, 16), (16384, 32), (32768, 32)):
        triton_sweep.PLAIN_BLOCK, triton_sweep.NUM_WARPS = block, warps
        arguments = logits, targets, Objective(), Shard.whole(words), True
        call = partial(triton_sweep.sweep, *arguments)
        seconds = best_of(rounds, [call], torch.cuda.synchronize)[0][0]
        found.append({"block": block, "warps": warps, "seconds": seconds})
    triton_sweep.PLAIN_BLOCK, triton_sweep.NUM_WARPS = held
    return found


def step_of(entrant: Contender, problem: Problem) -> Callable[[], None]:
    """Forward and backward."""

    def step() -> None:
        problem.hidden.grad = problem.head.grad = None
        entrant.loss(problem).backward()

    return step


def floor_of(problem: Problem) -> Callable[[], None]:
    """The three matrix products that nobody can do without."""
    hidden, head = problem.hidden.detach(), problem.head.detach()
    logits = torch.empty(len(hidden), len(head), dtype=hidden.dtype, device=hidden.device)
    of_hidden, of_head = torch.empty_like(hidden), torch.empty_like(head)

    def step() -> None:
        torch.mm(hidden, head.T, out=logits)
        torch.mm(logits, head, out=of_hidden)
        torch.mm(logits.T, hidden, out=of_head)

    return step


def best_of(
    rounds: int, calls: list[Callable[[], Any]], wait: Callable[[], None]
) -> list[tuple[float, float]]:
    """(seconds, CPU seconds) of every call: the best of rounds in which each has its turn.

    A turn is two calls of which the second counts: in training too the step before was the same
    one, so no contender pays for the memory that its neighbour gave back to the system.
    """
    best = [(float("inf"), float("inf"))] * len(calls)
    for _ in range(rounds):
        for place, call in enumerate(calls):
            call()
            wait()
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            wait()
            taken = time.perf_counter() - wall, time.process_time() - cpu
            best[place] = min(best[place][0], taken[0]), min(best[place][1], taken[1])
    return best


def gradient_error(entrant: Contender, problem: Problem) -> float:
    """|gradient - truth| / |truth| over hidden and head, the larger."""
    if entrant.dense:
        problem.with_dense()
    if (entrant.divergence, entrant.tail) not in _truths:
        exact = problem.double()
        contenders.truth(entrant).loss(exact).backward()
        _truths[entrant.divergence, entrant.tail] = (exact.hidden.grad, exact.head.grad)
    step_of(entrant, problem)()
    found = problem.hidden.grad, problem.head.grad
    exact_gradients = _truths[entrant.divergence, entrant.tail]
    return max(_error(a, b) for a, b in zip(found, exact_gradients, strict=True))


_truths: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}


def _error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def _extra_peak_in_a_process(place: int) -> int:
    """Bytes above the inputs; large blocks go back to the system at once, so none are hidden."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.topk_divergence", "--memory-of", str(place)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(run.stdout.splitlines()[-1])


def _high_water(entrant: Contender) -> int:
    """Linux: the peak of resident memory in one step, after a first one warmed everything up."""
    torch.set_num_threads(1)
    problem = Problem.make(**CPU_PROBLEM, dtype=torch.float32, device="cpu")
    step = step_of(entrant, problem)
    step()
    problem.hidden.grad = problem.head.grad = None
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def run_contract() -> str:
    """The last line of the contract suite on this GPU."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", CONTRACT]
    run = subprocess.run(command, capture_output=True, text=True)
    return (run.stdout.strip() or run.stderr.strip() or "no output").splitlines()[-1]


def describe(entrant: Contender, sizes: dict[str, int], device: str, dtype: str) -> dict[str, Any]:
    """What a row is about."""
    what = {"impl": entrant.impl, "divergence": entrant.divergence, "tail": entrant.tail}
    return what | {"device": device, **sizes, "dtype": dtype}


def surroundings(cuda: bool) -> dict[str, Any]:
    """Hardware, versions and date."""
    gpu = torch.cuda.get_device_name() if cuda else "none at hand: no GPU figure was measured"
    return {
        "machine": machine(),
        "gpu": gpu,
        "threads": 1 if not cuda else None,
        "versions": {name: _version(name) for name in PACKAGES},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def table(result: dict[str, Any]) -> str:
    """The rows, each against the floor."""
    floor = result["floor_cpu_seconds" if result["rows"][0]["device"] == "cpu" else "floor_seconds"]
    lines = [f"{'':34}{'divergence':16}{'tail':10}{'CPU s':>8}{'x floor':>9}{'MB':>8}{'error':>9}"]
    for row in (row for row in result["rows"] if "failed" not in row):
        seconds = row["cpu_seconds" if row["device"] == "cpu" else "seconds"]
        lines.append(
            f"{row['impl']:34}{row['divergence']:16}{row['tail']:10}{seconds:8.3f}"
            f"{seconds / floor:9.2f}{row['extra_peak_bytes'] / 1e6:8.1f}{row['grad_error']:9.1e}"
        )
    return "\n".join([*lines, f"floor (three matrix products): {floor:.3f} s"])


if __name__ == "__main__":
    main()
