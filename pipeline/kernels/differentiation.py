"""Autograd around the fused form: the gradients that a forward pass took along, handed over once.

One idea: `chunked.sweep_rows` gives losses and the gradients of their sum. Rows that all get the
same factor (`loss.sum()`, `loss.sum() / count`) only scale what was kept. Any other grad_output is
right too, but d_unembedding is a sum over rows already taken, so it is computed again: give row
weights as `weights`, where they cost nothing. What cannot be right is refused: a second derivative,
and a gradient taken again of a teacher that has changed in place since. Nothing is swept here.
"""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stillroom.pipeline.kernels.chunked import Plan, Scale, sweep_rows

TOLD = "cross_entropy"
"""The one field of targets that a sweep writes; all others it reads."""
DENSE = "hidden", "unembedding", "bias"
"""Fields that are called as the student's arguments are, and are the teacher's."""


def divergence(hidden: Tensor, unembedding: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    """Losses [N], differentiable; without the cost of gradients where none are recorded.

    An autograd function is told which inputs require gradients, not whether anybody records them:
    a head does in every evaluation.
    """
    if not torch.is_grad_enabled():
        hidden, unembedding = hidden.detach(), unembedding.detach()
        bias = None if bias is None else bias.detach()
    return FusedDivergence.apply(hidden, unembedding, bias, plan)


class FusedDivergence(torch.autograd.Function):
    """Autograd around `sweep_rows`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, unembedding: Tensor, bias: Tensor | None, plan: Plan
    ) -> Tensor:
        """Losses [N]; keeps the gradients of their sum."""
        ctx.needed, ctx.plan = ctx.needs_input_grad[:3], plan
        ctx.versions = dict(versions(plan.targets))
        loss, gradients, unit = sweep_rows(hidden, unembedding, bias, plan, ctx.needed)
        ctx.kept = gradients, unit
        ctx.save_for_backward(hidden, unembedding, bias)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Hands over what was kept, scaled; computes again where scaling cannot be right."""
        with torch.no_grad():
            gradients = _backward(ctx, grad_outputs[0])
        if torch.is_grad_enabled():  # by create_graph
            gradients = Once.apply(gradients, *ctx.saved_tensors, *grad_outputs)
        return *gradients, None


class Once(torch.autograd.Function):
    """The same gradients, whose own gradients are an error and not silently zero.

    They are said to come of all that they depend on: autograd looks only where it is asked to.
    """

    @staticmethod
    def forward(
        ctx: Any, gradients: tuple[Tensor | None, ...], *of: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Nothing is done."""
        return gradients

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        """Refuses."""
        raise RuntimeError(
            "a fused divergence is differentiated once: its gradients were taken in the forward"
            " pass and have none of their own; use impl='eager', which autograd can follow twice"
        )


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    kept, ctx.kept = ctx.kept, None
    factor = common_factor(grad_output)
    if kept is None or factor is None:
        _require_unchanged(ctx.versions, ctx.plan.targets)
        plan, factor = with_factors(ctx.plan, grad_output), None
        hidden, unembedding, bias = ctx.saved_tensors
        kept = sweep_rows(hidden, unembedding, bias, plan, ctx.needed)[1:]
    gradients, unit = kept
    factors = [f for f in (factor, unit) if f is not None]
    return tuple(_scaled(gradient, factors, ctx.plan.scale_) for gradient in gradients)


def common_factor(grad_output: Tensor) -> Tensor | None:
    """The one value every row has, or None. A device is asked nothing: strides tell."""
    if grad_output.numel() < 2 or grad_output.stride(0) == 0:  # expanded, as sum() leaves it
        return grad_output[:1].sum()
    if grad_output.device.type == "cpu" and bool((grad_output == grad_output[0]).all()):
        return grad_output[0]
    return None


def with_factors(plan: Plan, factors: Tensor) -> Plan:
    """The plan with every row's weight multiplied by a factor [N].

    Cross-entropies were told in the forward pass, and whose they are may have changed them since.
    """
    weights = plan.targets.weights
    weights = factors if weights is None else weights.to(factors) * factors
    return replace(plan, targets=replace(plan.targets, weights=weights, cross_entropy=None))


def versions(targets: Any) -> Iterator[tuple[str, int]]:
    """How often each tensor that a sweep reads has been written to, by its name.

    A device is asked nothing. Tensors of inference mode are not counted by torch.
    """
    for field in fields(targets):
        value = getattr(targets, field.name)
        if is_dataclass(value):
            yield from versions(value)
        elif isinstance(value, Tensor) and field.name != TOLD and not value.is_inference():
            of_teacher = "teacher_" if field.name in DENSE else ""
            yield of_teacher + field.name, value._version


def _require_unchanged(before: dict[str, int], targets: Any) -> None:
    changed = [name for name, now in versions(targets) if before[name] != now]
    if changed:
        raise RuntimeError(
            f"{', '.join(changed)}: changed in place since the divergence was computed, whose"
            " gradient has to be computed again, as its rows got different factors or backward ran"
            " before; keep them as they are until then, or give the factors as weights and"
            " reduce with .sum()"
        )


def _scaled(gradient: Tensor | None, factors: list[Tensor], scale_: Scale) -> Tensor | None:
    if gradient is None or not factors:
        return gradient
    factor = factors[0] if len(factors) == 1 else factors[0] * factors[1]
    if factor.device.type == "cpu" and factor == 1:
        return gradient
    return scale_(gradient, factor)
