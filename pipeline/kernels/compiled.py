"""The fused divergences as torch.library operators: what torch.compile and torch.export see.

One idea: `chunked` writes into one buffer and hands over gradients that it took on the way, which
no tracer can follow; so a tracer gets one opaque operator with a statement of its outputs' shapes
(the fake), and a second one for the backward pass, which decides as `differentiation` does whether
what was kept needs only a factor. Nothing is computed here; outside of a tracer there is
`differentiation`, which scales its gradients in place where an operator has to give new tensors.

An operator's schema knows tensors, numbers and text, and no dataclass; `Call` packs what says how a
divergence is computed into these. Not here: heads that are shards of one, and packed lists, which
break the graph as before.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stillroom.pipeline.kernels import autocasting, execution
from stillroom.pipeline.kernels.chunked import Plan, sweep_rows
from stillroom.pipeline.kernels.dense_sweep import DenseTargets
from stillroom.pipeline.kernels.differentiation import common_factor, with_factors
from stillroom.pipeline.kernels.divergences import Objective
from stillroom.pipeline.kernels.precision import wide
from stillroom.pipeline.kernels.targets import Targets
from stillroom.pipeline.kernels.vocabulary_shards import Shard

Gradients = tuple[Tensor, Tensor, Tensor]
"""Of hidden, unembedding and bias; without elements where not asked for."""


@dataclass(frozen=True, slots=True)
class Call:
    """How a divergence is computed, out of an operator's plain arguments.

    Attributes:
        kinds: divergence, tail and implementation, by name, with blanks between.
        numbers: beta, alpha, temperature, weight of the cross-entropy, soft cap of the student and
            of the teacher; a soft cap of 0 is none.
        sizes: real words of the head, and bytes of a chunk's buffers, where 0 is the default.
        flags: whether hidden, unembedding and bias get gradients; whether cross-entropies are told;
            whether d_unembedding is summed in fp32; whether the teacher is dense.
        dtype: of the matrix products.
    """

    kinds: str
    numbers: list[float]
    sizes: list[int]
    flags: list[bool]
    dtype: torch.dtype

    @property
    def needed(self) -> tuple[bool, ...]:
        """Which of hidden, unembedding and bias get gradients."""
        return tuple(self.flags[:3])

    @property
    def tells(self) -> bool:
        """Whether cross-entropies are asked for."""
        return self.flags[3]

    def plan(
        self,
        hidden: Tensor,
        unembedding: Tensor,
        teacher: list[Tensor],
        labels: Tensor | None,
        weights: Tensor | None,
        told: Tensor | None,
    ) -> Plan:
        """The plan of a call; `told` [N] is to be filled with cross-entropies."""
        divergence, tail, impl = self.kinds.split()
        *of_objective, softcap, teacher_softcap = self.numbers
        beta, alpha, temperature, ce_weight = of_objective
        objective: Any = (divergence, beta, alpha, tail, temperature, ce_weight, softcap or None)
        words, budget = self.sizes
        *_, accumulates, dense = self.flags
        rest: Any = (labels, weights, told)
        if dense:
            states, head, *bias = teacher
            own = states, head, bias[0] if bias else None, teacher_softcap or None
            targets: Any = DenseTargets(*own, *rest)
            sweep = execution.dense_teacher_sweep(impl, hidden)  # type: ignore[arg-type]
        else:
            targets = Targets(*teacher, *rest)
            sweep = execution.sparse_sweep(impl, hidden, Shard.whole(words))  # type: ignore[arg-type]
        return execution.plan(
            sweep,
            hidden,
            unembedding,
            targets,
            Objective(*objective),
            Shard.whole(words),
            budget or None,
            accumulates,
            triton=impl == "triton",
            teacher_itemsize=teacher[1].dtype.itemsize if dense else 0,
            compute=self.dtype,
        )


def divergence(
    hidden: Tensor,
    unembedding: Tensor,
    bias: Tensor | None,
    targets: Targets | DenseTargets,
    objective: Objective,
    impl: str,
    words: int,
    budget: int | None,
    accumulate_fp32: bool,
) -> Tensor:
    """Losses [N] by the operator; `targets.cross_entropy` [N] is filled, where there is one."""
    dense = isinstance(targets, DenseTargets)
    if dense:
        teacher = [targets.hidden, targets.unembedding]
        teacher += [] if targets.bias is None else [targets.bias]
    else:
        teacher = [targets.ids, targets.logprobs]
    cap = targets.softcap if dense else None
    given, told = (hidden, unembedding, bias), targets.cross_entropy
    needed = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in given]
    loss, ce, *_ = fused(
        *given,
        teacher,
        targets.labels,
        targets.weights,
        f"{objective.divergence} {objective.tail} {impl}",
        [
            *(objective.beta, objective.alpha, objective.temperature, objective.ce_weight),
            *(objective.softcap or 0.0, cap or 0.0),
        ],
        [words, budget or 0],
        [*needed, told is not None, accumulate_fp32, dense],
        autocasting.dtype_of(hidden),
    )
    if told is not None:
        told.copy_(ce)
    return loss


@torch.library.custom_op("stillroom::fused_divergence", mutates_args=())
def fused(
    hidden: Tensor,
    unembedding: Tensor,
    bias: Tensor | None,
    teacher: list[Tensor],
    labels: Tensor | None,
    weights: Tensor | None,
    kinds: str,
    numbers: list[float],
    sizes: list[int],
    flags: list[bool],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses [N], cross-entropies [N], the gradients of the losses' sum, and the unit of these.

    Args:
        teacher: ids and log-probabilities [N, k]; or states [N, D'], head [V', D'], maybe bias.
        kinds, numbers, sizes, flags, dtype: see `Call`.
    """
    call = Call(kinds, numbers, sizes, flags, dtype)
    told = torch.empty(len(hidden) * call.tells, dtype=torch.float32, device=hidden.device)
    asked = told if call.tells else None
    plan = call.plan(hidden, unembedding, teacher, labels, weights, asked)
    loss, gradients, unit = sweep_rows(hidden, unembedding, bias, plan, call.needed)
    unit = loss.new_ones(()) if unit is None else unit.to(loss.dtype)
    return loss, told, *_filled(gradients, hidden), unit


@fused.register_fake
def _(
    hidden, unembedding, bias, teacher, labels, weights, kinds, numbers, sizes, flags, dtype
):  # fmt: skip
    rows = hidden.shape[0]  # len() would settle a size that a tracer leaves open
    loss = hidden.new_empty(rows, dtype=wide(dtype))
    told = hidden.new_empty(rows if flags[3] else 0, dtype=torch.float32)
    return loss, told, *_shapes(hidden, unembedding, bias, flags), loss.new_empty(())


@torch.library.custom_op("stillroom::fused_divergence_backward", mutates_args=())
def fused_backward(
    grad_output: Tensor,
    kept: list[Tensor],
    unit: Tensor,
    hidden: Tensor,
    unembedding: Tensor,
    bias: Tensor | None,
    teacher: list[Tensor],
    labels: Tensor | None,
    weights: Tensor | None,
    kinds: str,
    numbers: list[float],
    sizes: list[int],
    flags: list[bool],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for `grad_output` [N]: those kept, times a factor; or taken again."""
    factor = _factor(grad_output)
    if factor is not None:
        return _times(kept, factor * unit)
    call = Call(kinds, numbers, sizes, flags, dtype)
    plan = call.plan(hidden, unembedding, teacher, labels, weights, None)
    plan = with_factors(plan, grad_output)
    _, again, new_unit = sweep_rows(hidden, unembedding, bias, plan, call.needed)
    found = _filled(again, hidden)
    return found if new_unit is None else _times(found, new_unit)


@fused_backward.register_fake
def _(
    grad_output, kept, unit, hidden, unembedding, bias, teacher, labels, weights,
    kinds, numbers, sizes, flags, dtype,
):  # fmt: skip
    return _shapes(hidden, unembedding, bias, flags)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, unembedding, bias, teacher, labels, weights, *ctx.call = inputs
    _, _, *kept, unit = output
    ctx.save_for_backward(unit, hidden, unembedding, bias, labels, weights, *kept, *teacher)
    ctx.teachers = len(teacher)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple:
    unit, hidden, unembedding, bias, labels, weights, *more = ctx.saved_tensors
    kept, given = more[:3], (hidden, unembedding, bias, more[3:], labels, weights)
    found = fused_backward(grad_output, kept, unit, *given, *ctx.call)
    needed = ctx.call[3][:3]
    gradients = (one if wanted else None for one, wanted in zip(found, needed))
    return *gradients, [None] * ctx.teachers, None, None, *[None] * len(ctx.call)


fused.register_autograd(_backward, setup_context=_keep)


def _factor(grad_output: Tensor) -> Tensor | None:
    """The one value that every row has, or None. A compiler writes out what sum() expands, so here
    a device is asked: that wait is less than the chunks computed again."""
    if (found := common_factor(grad_output)) is not None:
        return found
    return grad_output[0].clone() if bool((grad_output == grad_output[0]).all()) else None


def _times(gradients: Any, factor: Tensor) -> Gradients:
    h, u, b = (gradient * factor.to(gradient.dtype) for gradient in gradients)
    return h, u, b


def _filled(gradients: Any, like: Tensor) -> Gradients:
    h, u, b = (like.new_empty(0) if one is None else one for one in gradients)
    return h, u, b


def _shapes(
    hidden: Tensor, unembedding: Tensor, bias: Tensor | None, flags: list[bool]
) -> Gradients:
    given = hidden, unembedding, bias
    h, u, b = (
        torch.empty_like(one, memory_format=torch.contiguous_format)
        if one is not None and wanted
        else hidden.new_empty(0)
        for one, wanted in zip(given, flags)
    )
    return h, u, b
