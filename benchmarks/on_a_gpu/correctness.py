"""What the interpreter cannot show of the divergences: races, odd widths, large chunks, graphs.

One idea: each section compares the compiled kernels with themselves, with plain torch on the same
device, or with float64, within a bound that follows from the dtype. None measures speed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks._divergence_contenders import Problem, ours, truth
from benchmarks.on_a_gpu.scale import Scale, difference
from benchmarks.on_a_gpu.sections import SKIPPED
from stillroom.pipeline.kernels.divergences import Objective
from stillroom.pipeline.kernels.targets import Targets
from stillroom.pipeline.kernels.topk_divergence import topk_divergence
from stillroom.pipeline.kernels.triton import sweep as triton_sweep
from stillroom.pipeline.kernels.vocabulary_shards import Shard

ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Relative error of a gradient: sums of thousands of terms that have 24 or 8 bits."""
OBJECTIVES = {
    "forward_kl": Objective(),
    "capped": Objective("jsd", softcap=30.0, temperature=2.0, ce_weight=0.5),
    "adaptive_kl": Objective("adaptive_kl"),
}


def lists(rows: int, words: int, device: str, k: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids int32, logprobs) [rows, k] of a made-up teacher."""
    random = torch.Generator(device).manual_seed(1)
    logits = torch.randn(rows, words, generator=random, device=device)
    logprobs, ids = logits.log_softmax(1).topk(min(k, words - 1), 1)
    return ids.int(), logprobs


@contextmanager
def launched(warps: int, block: int | None = None) -> Iterator[None]:
    """Within it the divergence's sweep is launched so."""
    before = triton_sweep.NUM_WARPS, triton_sweep.PLAIN_BLOCK
    triton_sweep.NUM_WARPS, triton_sweep.PLAIN_BLOCK = warps, block or before[1]
    try:
        yield
    finally:
        triton_sweep.NUM_WARPS, triton_sweep.PLAIN_BLOCK = before


def bits(scale: Scale) -> dict[str, Any]:
    """Twice the same inputs give the same bits; other launches agree within a rounding."""
    rows, words = scale.pick((4096, 151_936), (3, 700))
    ids, logprobs = lists(rows, words, scale.device)
    logits = 3 * torch.randn(rows, words, device=scale.device)
    targets = Targets(ids, logprobs, ids[:, 3].long().contiguous(), None)
    wrong = []
    for name, objective in OBJECTIVES.items():
        first = _swept(logits, targets, objective, 8)
        for warps in (8, 4, 16):
            again = _swept(logits, targets, objective, warps)
            if warps == 8 and not all(map(torch.equal, first, again)):
                wrong.append(f"{name}: other bits from the same inputs")
            if not all(map(_near, first, again)):
                wrong.append(f"{name}: {warps} warps say something else")
    return {"wrong": wrong}


def _swept(logits: torch.Tensor, targets: Targets, objective: Objective, warps: int):
    """(losses, gradients) out of a buffer whose spare columns must stay as they are."""
    words = logits.shape[1]
    buffer = logits.new_full((len(logits), words + 16), float("nan"), dtype=torch.bfloat16)
    buffer[:, :words] = logits
    with launched(warps):
        loss = triton_sweep.sweep(buffer, targets, objective, Shard.whole(words), True)
    assert buffer[:, words:].isnan().all(), "a sweep wrote behind its row"
    return loss, buffer[:, :words].clone()


def _near(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal but for the last bit of bfloat16; False for NaN."""
    gap = (one.float() - other.float()).abs()
    return bool((gap <= 2**-7 * one.float().abs() + 1e-6).all())


def odd_widths(scale: Scale) -> dict[str, Any]:
    """Gradients over vocabularies that no power of two divides, against float64."""
    errors, wrong = {}, []
    for words in scale.pick((50_257, 49_155, 151_933, 32_003, 129), (129, 67)):
        for dtype, bound in ROUNDING.items():
            sizes = {"n": scale.pick(48, 3), "d": 64, "v": words, "k": 16}
            problem = Problem.make(**sizes, dtype=dtype, device=scale.device)
            for divergence in scale.pick(("forward_kl", "reverse_kl", "jsd"), ("forward_kl",)):
                name = f"{words} {str(dtype).removeprefix('torch.')} {divergence}"
                errors[name] = error = _error(problem, divergence)
                if not error <= bound:
                    wrong.append(f"{name}: off by {error:.3g}")
    return {"errors": errors, "wrong": wrong}


def _error(problem: Problem, divergence: str) -> float:
    """The larger of the relative errors of both gradients."""
    entrant, exact = ours("triton", divergence), problem.double()
    truth(entrant).loss(exact).backward()
    problem.hidden.grad = problem.head.grad = None
    entrant.loss(problem).backward()
    return max(map(difference, gradients(problem), gradients(exact)))


def gradients(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the hidden states and of the head."""
    hidden, head = problem.hidden.grad, problem.head.grad
    assert hidden is not None
    assert head is not None
    return hidden, head


def beyond_int32(scale: Scale) -> dict[str, Any]:
    """One chunk of 2.49e9 logits says what small chunks say."""
    rows, width, words = scale.pick((16_384, 256, 151_936), (8, 16, 500))
    problem = _large(scale.device, rows, width, words)
    found = []
    for budget in scale.pick((2**33, 2**28), (2**20, 2**12)):
        hidden, head = (tensor.clone().requires_grad_() for tensor in problem[:2])
        inputs = hidden, head, *problem[2:]
        loss = topk_divergence(*inputs, impl="triton", memory_budget=budget, accumulate_fp32=True)
        loss.sum().backward()
        found.append((loss.detach(), hidden.grad, head.grad))
    names = ("loss", "hidden", "head")
    gaps = {name: difference(a, b) for name, a, b in zip(names, *found)}
    wrong = [f"{name} differs by {gap:.3g}" for name, gap in gaps.items() if not gap <= 1e-2]
    return {"elements": rows * words, "differences": gaps, "wrong": wrong}


def _large(device: str, rows: int, width: int, words: int):
    """Inputs whose teacher needs no [rows, words]."""
    random = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(rows, width, generator=random, device=device).bfloat16()
    head = (torch.randn(words, width, generator=random, device=device) * width**-0.5).bfloat16()
    step = words // 64
    first = torch.randint(0, step, (rows, 1), generator=random, device=device)
    ids = (first + step * torch.arange(64, device=device)).int()
    return hidden, head, ids, torch.full((rows, 64), -6.0, device=device)


def autocast_head(scale: Scale) -> dict[str, Any]:
    """The trainer's path: an fp32 master head under autocast to bfloat16, against float64."""
    rows, width, words = scale.pick((1024, 512, 20_000), (6, 16, 500))
    sizes = {"n": rows, "d": width, "v": words, "k": scale.pick(64, 8)}
    problem = Problem.make(**sizes, dtype=torch.float32, device=scale.device)
    exact = problem.double()
    ours("eager").loss(exact).backward()
    inputs = problem.hidden, problem.head, problem.ids, problem.logprobs
    with torch.autocast(scale.device, dtype=torch.bfloat16):
        loss = topk_divergence(*inputs, impl="triton", memory_budget=256 * words * 2)
    loss.sum().backward()
    gaps = [*map(difference, gradients(problem), gradients(exact))]
    wrong = [] if max(gaps) <= ROUNDING[torch.bfloat16] else [f"gradients are off by {gaps}"]
    return {"errors": gaps, "wrong": wrong}


def _steps(scale: Scale, device: str):
    """(inputs, a step of which they are all that changes)."""
    rows, width, words = scale.pick((512, 256, 20_000), (4, 16, 300))
    k = scale.pick(64, 8)
    problem = Problem.make(rows, width, words, k, dtype=torch.bfloat16, device=device)

    def step() -> torch.Tensor:
        problem.hidden.grad = problem.head.grad = None
        loss = ours("triton").loss(problem)
        loss.backward()
        return loss.detach()

    return problem, step


def cuda_graph(scale: Scale) -> dict[str, Any]:
    """A recorded step, replayed, gives the gradients of a step."""
    problem, step = _steps(scale, scale.device)
    replay = step if scale.tiny else _recorded(problem, step)
    replay()
    scale.wait()
    replayed = [gradient.clone() for gradient in gradients(problem)]
    step()
    same = all(map(torch.equal, replayed, gradients(problem)))
    return {"wrong": [] if same else ["a replayed step has other gradients"]}


def _recorded(problem: Problem, step):
    """The step as a CUDA graph's replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    problem.hidden.grad = problem.head.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def compiled_door(scale: Scale) -> dict[str, Any]:
    """`torch.compile(fullgraph=True)` around the door: no break, the same gradients."""
    problem, step = _steps(scale, scale.device)
    step()
    plain = [gradient.clone() for gradient in gradients(problem)]
    backend = scale.pick("inductor", "aot_eager")  # a CPU would compile C++ for a minute
    door = torch.compile(ours("triton").loss, fullgraph=True, backend=backend)
    problem.hidden.grad = problem.head.grad = None
    door(problem).backward()
    gaps = [*map(difference, gradients(problem), plain)]
    bound = ROUNDING[torch.bfloat16]
    return {"differences": gaps, "wrong": [f"off by {gaps}"] if max(gaps) > bound else []}


def two_devices(scale: Scale) -> dict[str, Any]:
    """A head on the second GPU while the first is current."""
    if not scale.tiny and torch.cuda.device_count() < 2:
        return {SKIPPED: "one GPU"}
    found = []
    for device in scale.pick(("cuda:1", "cuda:0"), ("cpu", "cpu")):
        problem, step = _steps(scale, device)
        loss = step()
        found.append([tensor.cpu() for tensor in (loss, *gradients(problem))])
    gaps = [difference(one, other) for one, other in zip(*found)]
    # The random inputs of two GPUs of one kind are the same.
    return {"differences": gaps, "wrong": [f"off by {gaps}"] if max(gaps) > 1e-2 else []}
