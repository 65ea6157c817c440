"""The second door: a student's head against a teacher's, both given by hidden states.

One idea: final hidden states and a head are a distribution over the whole vocabulary, at any
temperature, in D' numbers a row; both sides' logits are made chunk by chunk and never kept. The
divergences are those of `topk_divergence` with every word in the list and no tail.
"""

from torch import Tensor

from stillroom.pipeline.kernels import (
    argument_checks,
    compiled,
    differentiation,
    eager,
    execution,
    value_checks,
)
from stillroom.pipeline.kernels.dense_sweep import DenseTargets
from stillroom.pipeline.kernels.divergences import DivergenceName, Objective
from stillroom.pipeline.kernels.execution import Implementation


def linear_divergence(
    hidden: Tensor,
    unembedding: Tensor,
    teacher_hidden: Tensor,
    teacher_unembedding: Tensor,
    *,
    divergence: DivergenceName = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    temperature: float = 1.0,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    weights: Tensor | None = None,
    cross_entropy: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    teacher_bias: Tensor | None = None,
    teacher_softcap: float | None = None,
    valid_vocab: int | None = None,
    impl: Implementation = "chunked",
    memory_budget: int | None = None,
    accumulate_fp32: bool = False,
    debug: bool | None = None,
) -> Tensor:
    """Per-row divergence between two linear heads' softmaxes.

    Computes `T**2 * D(softmax(teacher_hidden @ teacher_unembedding.T / T), softmax(hidden @
    unembedding.T / T)) + ce_weight * cross_entropy` per row without holding [N, V] logits of
    either, with gradients for hidden, unembedding and bias. The teacher gets none.

    Args:
        teacher_hidden: [N, D'] the teacher's states after its final norm.
        teacher_unembedding: [V', D'] its head; must cover the student's real words.
        teacher_bias: [V'] of its head.
        teacher_softcap: cap of its tanh soft-capped logits.
        impl: `eager` (the truth), `chunked` (torch, any device) or `triton` (CUDA).
        debug: check the values of labels and weights; see `topk_divergence`.
        hidden, unembedding, divergence, beta, alpha, temperature, labels, ce_weight, weights,
        cross_entropy, bias, softcap, valid_vocab, memory_budget, accumulate_fp32: see
        `topk_divergence`.

    Returns:
        fp32 [N] (fp64 for fp64 inputs); reduce it with `.sum()`.

    Raises:
        ValueError, TypeError: an argument that cannot mean what it says.
        RuntimeError: `triton` was asked for and cannot run.
    """
    # Every word is listed, so there is no tail to treat.
    objective = Objective(divergence, beta, alpha, "truncate", temperature, ce_weight, softcap)
    argument_checks.check_objective(objective, None, None)
    argument_checks.check_student(hidden, unembedding, bias)
    shard = argument_checks.check_words(unembedding, valid_vocab, None, impl)
    argument_checks.check_rows(
        hidden, labels=labels, weights=weights, told=cross_entropy, ce_weight=ce_weight
    )
    argument_checks.check_how(impl, memory_budget)
    argument_checks.check_teacher(
        hidden, teacher_hidden, teacher_unembedding, teacher_bias, teacher_softcap, shard.total
    )
    if execution.debugging(debug, hidden):
        value_checks.check_row_values(labels, weights, shard.total)
    targets = DenseTargets(
        teacher_hidden.detach(),
        teacher_unembedding.detach(),
        None if teacher_bias is None else teacher_bias.detach(),
        teacher_softcap,
        labels,
        weights,
        cross_entropy,
    )
    if impl == "eager":
        return eager.linear_divergence(hidden, unembedding, bias, targets, objective, shard.total)
    if execution.traced():
        how = objective, impl, shard.total, memory_budget, accumulate_fp32
        return compiled.divergence(hidden, unembedding, bias, targets, *how)
    plan = execution.plan(
        execution.dense_teacher_sweep(impl, hidden),
        hidden,
        unembedding,
        targets,
        objective,
        shard,
        memory_budget,
        accumulate_fp32,
        triton=impl == "triton",
        teacher_itemsize=teacher_unembedding.dtype.itemsize,
    )
    return differentiation.divergence(hidden, unembedding, bias, plan)
