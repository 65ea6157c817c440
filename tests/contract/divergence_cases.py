"""Rows for the divergence's contract, and its two judges.

The truth is eager in fp64 on the very inputs (a bf16 tensor is an exact fp64 one). An
implementation may miss it by as much as eager in the inputs' own dtype does, plus `TOLERANCE`.
Two ways to the same value are computed in fp64 where the implementation can, and differ by
`ROUNDING`.
"""

import os
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stillroom.pipeline.kernels.topk_divergence import topk_divergence

IMPLEMENTATIONS = os.environ.get("STILLROOM_TEST_KERNELS", "eager chunked").split()
DEVICE = os.environ.get("STILLROOM_TEST_DEVICE", "cpu")
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""Relative (Frobenius) error allowed beyond the naive computation's: half an eps of the dtype for
the rounding of the logits' gradient before its matrix products, some eps of fp32 for row sums."""

ROUNDING = {torch.float64: 1e-12, torch.float32: 32 * 2.0**-24}
"""Relative (Frobenius) difference of two ways to one value. A logit of size 8 is off by two or so
roundings (2^-24 of it in fp32); that is the relative error of its probability, and so of the
gradients, which sum probabilities; both ways have it: 2 x 8 x 2 roundings. fp64's are 5e8 times
smaller, and 1e-12 leaves a hundred of them for what cancels."""


def judged(impl: str) -> torch.dtype:
    """The dtype in which an implementation's ways to one value are compared."""
    return torch.float32 if impl == "triton" else torch.float64


@dataclass
class Case:
    """Arguments of one call, with the tensors that are differentiated apart."""

    hidden: Tensor
    unembedding: Tensor
    bias: Tensor | None
    ids: Tensor
    logprobs: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> "Case":
        """The same numbers in another dtype."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(
            self, hidden=self.hidden.to(dtype), unembedding=self.unembedding.to(dtype), bias=bias
        )

    def run(self, impl: str, **options: Any) -> dict[str, Tensor]:
        """Loss and gradients of the summed loss."""
        leaves = {
            name: value.detach().clone().requires_grad_()
            for name, value in (
                ("hidden", self.hidden),
                ("unembedding", self.unembedding),
                ("bias", self.bias),
            )
            if value is not None
        }
        arguments = {"bias": leaves.get("bias"), "impl": impl} | self.options | options
        loss = topk_divergence(
            leaves["hidden"], leaves["unembedding"], self.ids, self.logprobs, **arguments
        )
        loss.sum().backward()
        return {"loss": loss.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def make_case(
    rows: int = 11,
    width: int = 24,
    words: int = 131,
    k: int = 7,
    *,
    dtype: torch.dtype = torch.float32,
    ids_dtype: torch.dtype = torch.int64,
    with_bias: bool = True,
    padding: bool = True,
    sharpness: float = 1.5,
    seed: int = 0,
    **options: Any,
) -> Case:
    """A random case; ids of word 0 and of the last word occur, and so does padding."""
    random = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)  # noqa: E731
    logits = sharpness * normal(rows, words)
    logits[::2, 0] += 4
    logits[1::2, words - 1] += 4
    logprobs, ids = logits.log_softmax(1).topk(k, 1)
    if padding and k > 1:
        ids[::3, -1] = -1
        logprobs[::3, -1] = -torch.inf
    case = Case(
        hidden=normal(rows, width),
        unembedding=normal(words, width) * sharpness / width**0.5,
        bias=normal(words) * 0.3 if with_bias else None,
        ids=ids.to(ids_dtype).to(DEVICE),
        logprobs=logprobs.float().to(DEVICE),
        options={
            name: value.to(DEVICE) if isinstance(value, Tensor) else value
            for name, value in options.items()
        },
    )
    case = case.to(dtype)
    bias = None if case.bias is None else case.bias.to(DEVICE)
    return replace(
        case, hidden=case.hidden.to(DEVICE), unembedding=case.unembedding.to(DEVICE), bias=bias
    )


def with_draws(case: Case, draws: int, seed: int = 0) -> Case:
    """The case with distinct words drawn outside its ids, their weights summing to the tail."""
    random = torch.Generator().manual_seed(seed)
    rows, words = case.ids.shape[0], case.unembedding.shape[0]
    order = torch.rand(rows, words + 1, generator=random).to(DEVICE)
    order.scatter_(1, torch.where(case.ids < 0, words, case.ids).long(), 2.0)
    order[:, words] = 2.0
    tail_ids = order.argsort(1)[:, :draws]
    shares = torch.rand(rows, draws, generator=random).to(DEVICE) + 0.1
    tail = 1 - (case.logprobs.double().exp() * (case.ids >= 0)).sum(1, keepdim=True)
    shares = (shares / shares.sum(1, keepdim=True) * tail).float()
    if draws > 1:
        tail_ids[::4, -1] = -1
    options = {"tail": "sampled", "tail_ids": tail_ids, "tail_weights": shares}
    return replace(case, options=case.options | options)


def error(found: Tensor, truth: Tensor) -> float:
    """|found - truth| / |truth|, and infinity where either is not finite."""
    difference = (found.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-12)
    return difference.item() if bool(difference.isfinite()) else float("inf")


def assert_same(found: Tensor, expected: Tensor, what: Any = "") -> None:
    """Two ways to one value differ by the roundings of the dtype that was found."""
    assert error(found, expected) < ROUNDING[found.dtype], what


def assert_no_worse_than_naive(case: Case, impl: str, **options: Any) -> None:
    """Every value and gradient is as near to fp64 as the naive computation, within tolerance."""
    truth = case.to(torch.float64).run("eager")
    naive, found = case.run("eager"), case.run(impl, **options)
    for name in truth:
        allowed = error(naive[name], truth[name]) + TOLERANCE[case.hidden.dtype]
        assert error(found[name], truth[name]) <= allowed, name


def logit_gradients(case: Case, impl: str, logits: Tensor, **options: Any) -> dict[str, Tensor]:
    """Loss and d loss / d logits [N, V] for logits given outright: hidden states of an identity."""
    rows = len(logits)
    one_hot = torch.eye(rows, dtype=logits.dtype, device=logits.device)
    case = replace(case, hidden=one_hot, unembedding=logits.T.contiguous(), bias=None)
    found = case.run(impl, **options)
    return {"loss": found["loss"], "logits": found["unembedding"].T}


class Recorder(TorchDispatchMode):
    """The operations run inside, and the elements of the largest tensor any of them made."""

    def __init__(self):
        super().__init__()
        self.operations, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations.append(func.overloadpacket._qualified_op_name)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // 4)
        return result
