"""Speed of the divergences: ceilings of this GPU, the sweeps, whole steps, and their peers.

One idea: a time is a ratio to what the same process measured a moment before: a copy of the same
bytes for a sweep, the three matrix products for a step. It judges nothing.
"""

import gc
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import _divergence_contenders as contenders
from benchmarks import needs
from benchmarks._divergence_contenders import Problem, ours
from benchmarks.on_a_gpu.correctness import launched, lists
from benchmarks.on_a_gpu.scale import Scale
from benchmarks.topk_divergence import floor_of, step_of
from stillroom.pipeline.kernels.divergences import Objective
from stillroom.pipeline.kernels.targets import Targets
from stillroom.pipeline.kernels.topk_divergence import topk_divergence
from stillroom.pipeline.kernels.triton import sweep as triton_sweep
from stillroom.pipeline.kernels.vocabulary_shards import Shard

SHAPES = {
    "D4096": (8192, 4096, 151_936),
    "D2048": (8192, 2048, 151_936),
    "D1024": (8192, 1024, 151_936),
    "D576": (8192, 576, 49_152),
    "D2304": (8192, 2304, 256_000),
}
"""(rows, width, words) of a step: Qwen3's vocabulary at three widths, SmolLM2, Gemma 2."""
LAUNCHES = ((8192, 8), (4096, 8), (4096, 4), (16_384, 16), (32_768, 32))
"""(words of a block, warps)."""


def _copy_rate(scale: Scale) -> float:
    """Bytes a second, those read and those written."""
    source = torch.empty(scale.pick(2**28, 2**12), device=scale.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / scale.milliseconds(lambda: target.copy_(source)) * 1000


def ceilings(scale: Scale) -> dict[str, Any]:
    """Copy in TB/s; matrix products in TFLOP/s."""
    figures = {"copy_tb_s": _copy_rate(scale) / 1e12}
    size = scale.pick(8192, 16)
    for dtype in (torch.bfloat16, torch.float32):
        matrix = torch.randn(size, size, device=scale.device).to(dtype)
        taken = scale.milliseconds(lambda given=matrix: given @ given)
        name = str(dtype).removeprefix("torch.")
        figures[f"{name}_tflop_s"] = 2 * size**3 / taken / 1e9
    return figures


def divergence_sweep(scale: Scale) -> dict[str, Any]:
    """A chunk of logits swept: by launch, at an odd width, and for the heavier objectives."""
    rows, words = scale.pick((4096, 151_936), (3, 700))
    heavy = {"jsd": Objective("jsd"), "capped": Objective(softcap=30.0)}
    figures: dict[str, Any] = {"copy_tb_s": _copy_rate(scale) / 1e12}
    for block, warps in scale.pick(LAUNCHES, LAUNCHES[:1]):
        with launched(warps, block):
            name = f"{words} words, blocks of {block}, {warps} warps"
            figures[name] = _swept(scale, rows, words, Objective())
    figures[f"{words - 3} words"] = _swept(scale, rows, words - 3, Objective())
    for name, objective in heavy.items():
        figures[f"{words} words, {name}"] = _swept(scale, rows, words, objective)
    return figures


def _swept(scale: Scale, rows: int, words: int, objective: Objective) -> dict[str, float]:
    """Milliseconds with the gradient and without; TB/s if a row is read twice and written once."""
    buffer = torch.empty(rows, words // 16 * 16 + 16, device=scale.device, dtype=torch.bfloat16)
    targets = Targets(*lists(rows, words, scale.device), None, None)
    whole, figures = Shard.whole(words), {}
    for name, gradient in (("ms", True), ("read_ms", False)):
        buffer.normal_(0, 3)
        call = lambda with_it=gradient: triton_sweep.sweep(  # noqa: E731
            buffer, targets, objective, whole, with_it
        )
        figures[name] = scale.milliseconds(call)
    return figures | {"tb_s": 3 * rows * words * 2 / figures["ms"] / 1e9}


def dense_sweep(scale: Scale) -> dict[str, Any]:
    """A step against a dense teacher beside its floor, four products and a bit."""
    sizes = scale.pick((4096, 2048, 151_936, 64), (4, 16, 300, 8))
    problem = Problem.make(*sizes, dtype=torch.bfloat16, device=scale.device)
    figures = {"floor_ms": scale.milliseconds(floor_of(problem), 5)}
    for name in ("forward_kl", "jsd"):
        step = step_of(ours("triton", name, "dense"), problem)
        figures[f"{name}_ms"] = scale.milliseconds(step, 5)
    return figures


def whole_step(scale: Scale, shape: str) -> dict[str, Any]:
    """Forward and backward beside the three products; the fp32 master head under autocast."""
    rows, width, words = scale.pick(SHAPES[shape], (4, 16, 300))
    problem = _problem(scale, rows, width, words)
    floor = scale.milliseconds(floor_of(problem), 7)
    figures = {"floor_ms": floor}
    for name, entrant in {
        "triton": ours("triton"),
        "jsd": ours("triton", "jsd"),
        "chunked": ours("chunked"),
    }.items():
        figures[f"{name}_ms"] = scale.milliseconds(step_of(entrant, problem), 5)
    for mib in scale.pick((256, 1024, 2560), (1,)):
        call = _budgeted(problem, mib << 20)
        figures[f"triton_{mib}_mib_ms"] = scale.milliseconds(call, 5)
    figures["to_floor"] = figures["triton_ms"] / floor
    problem.hidden.grad = problem.head.grad = None
    master = Problem(
        problem.hidden.detach().float().requires_grad_(),
        problem.head.detach().float().requires_grad_(),
        *(problem.ids, problem.logprobs, problem.labels),
        *(problem.teacher_hidden, problem.teacher_head),
    )
    with torch.autocast(scale.device, dtype=torch.bfloat16):
        figures["fp32_master_ms"] = scale.milliseconds(step_of(ours("triton"), master), 5)
    return figures


def _problem(scale: Scale, rows: int, width: int, words: int) -> Problem:
    """As `Problem.make`, with random lists: no teacher's logits are made first."""
    random = torch.Generator(scale.device).manual_seed(0)
    at = {"generator": random, "device": scale.device}
    hidden = torch.randn(rows, width, **at).bfloat16()
    head = (torch.randn(words, width, **at) * width**-0.5).bfloat16()
    k = scale.pick(64, 8)
    first = torch.randint(0, words // k, (rows, 1), **at)
    ids = (first + words // k * torch.arange(k, device=scale.device)).int()
    logprobs = torch.full((rows, k), -7.0, device=scale.device)
    inputs = hidden.requires_grad_(), head.requires_grad_()
    return Problem(*inputs, ids, logprobs, ids[:, 0].long(), hidden.detach(), head.detach())


def _budgeted(problem: Problem, budget: int) -> Callable[[], None]:
    def step() -> None:
        problem.hidden.grad = problem.head.grad = None
        inputs = problem.hidden, problem.head, problem.ids, problem.logprobs
        topk_divergence(*inputs, impl="triton", memory_budget=budget).sum().backward()

    return step


PEERS = {
    "stillroom": "stillroom",
    "naive": "naive",
    "liger": "Liger",
    "cce": "cut-cross",
    "compile": "torch.compile",
}
"""Section -> how the contenders' names begin."""


def peers(scale: Scale, whose: str) -> dict[str, Any]:
    """Contenders of one name beside the floor; what is not installed says so."""
    sizes = scale.pick((8192, 2048, 151_936, 64), (4, 16, 300, 8))
    problem = Problem.make(*sizes, dtype=torch.bfloat16, device=scale.device)
    figures: dict[str, Any] = {"floor_ms": scale.milliseconds(floor_of(problem), 5)}
    for entrant in contenders.on_cuda():
        if entrant.impl.startswith(PEERS[whose]):
            name = f"{entrant.impl} {entrant.divergence} {entrant.tail}"
            figures[name] = _peer(scale, entrant, problem)
    return figures


def _peer(scale: Scale, entrant: contenders.Contender, problem: Problem) -> dict[str, Any]:
    try:
        if entrant.dense:
            problem.with_dense()
        return {"ms": scale.milliseconds(step_of(entrant, problem), 5)}
    except Exception as error:  # whatever a peer raises, the others are still measured
        return {"failed": needs.why_not(error)}
    finally:
        problem.dense = problem.hidden.grad = problem.head.grad = None
        gc.collect()
