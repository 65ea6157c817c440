"""The fused top-k divergence: LM head, temperature, sparse teacher and loss in one pass.

One idea: against a teacher known by k words and a tail, the gradient of any divergence is one
scalar per row times the student's softmax, with k places corrected; so the logits can be made chunk
by chunk, turned into their gradient in place, and never kept. This module is the door: it states
the mathematics, checks the arguments and picks the implementation that was asked for. It computes
nothing, and it never falls back from one implementation to another.

**Notation.** A row has hidden state h [D]; z = W h + b are its logits, soft-capped to
cap tanh(z / cap) where asked; x = z / T with temperature T; q = softmax(x) over the V real words.
S is the set of the row's teacher ids, p_j the teacher's full-softmax probability at T of word j,
M = sum_S p_j. Outcomes m are the words of S and, unless left out, one tail outcome t that stands
for all other words: q_t = sum_{i not in S} q_i.

**Tails.** What the teacher says about the words outside S:

    bucket        p_t = 1 - M is one outcome, q_t the other side of it: the divergence between
                  two distributions over k + 1 outcomes, a lower bound of the full one
    truncate      no tail outcome; p as it is. For forward KL its gradient is M times that of
                  renormalise; its value may be negative (its minimum is M log M)
    renormalise   p / M on S and p_t = 0: the teacher is taken to have no tail
    sampled       (forward KL) S is joined by words drawn from the tail, whose weights w sum to
                  1 - M and have expectation p: sum_S p log(p/q) + sum_draws w log(w/q). The
                  gradient is unbiased for the full forward KL; it is `truncate` over the longer
                  list (Anshumann et al. 2025, arXiv:2503.16870, stratified)

**Value.** L = T^2 sum_m f(p_m, q_m) + ce_weight * (logsumexp(z) - z_label), times the row's weight;
f for each divergence is in `divergences`. Cross-entropy is at temperature 1 and 0 without a label.

**Gradient.** L depends on x through the q_m. For j in S, dq_m/dx_j = q_m (1[m=j] - q_j); for a
word i outside S, dq_t/dx_i = q_i - q_t q_i and dq_m/dx_i = -q_m q_i. With g_m = df/dq_m,
r_m = q_m g_m and R = sum_m r_m:

    j in S        dD/dx_j = r_j - q_j R
    i outside S   dD/dx_i = q_i (g_t - R) = s_i (r_t - q_t R),   s_i = q_i / q_t

with s_i = exp(x_i - lse_tail): outside S a row needs one scalar, A = r_t - q_t R (with no tail
outcome, r_t = 0). The sum over all words is sum_S r_j + r_t - R = 0: every row of the gradient sums
to zero, for every divergence and tail. dz = dx / T, and T^2 makes the factor T. Cross-entropy adds
ce_weight (softmax(z) - onehot(label)); the soft cap multiplies by 1 - tanh^2(z / cap).
Written with s_i and r_t nothing is divided by q_t, and with log q_t = lse_tail - lse summed
directly over the words outside S, q_t is exact down to the smallest normal number; 1 - sum_S q_j
has no correct digit below 1e-7 in fp32.

**Words that do not exist.** Padded head rows (`valid_vocab` and beyond) are left out of every sum
and have zero gradient. Ids of -1 are padding. A row that names all words has no tail outcome. A
row that names none is 0 under every tail. Two equal ids in a row are an error (found by `debug`).

**Numerics.** Row arithmetic is fp32 (fp64 for fp64 inputs) whatever the inputs' dtype.
Log-probabilities below -10^4 count as -10^4, and reverse KL takes the logarithm of the teacher's
tail as at least that of 2^-24, so reverse divergences stay finite.
"""

from dataclasses import replace

import torch
from torch import Tensor

from stillroom.pipeline.kernels import (
    argument_checks,
    compiled,
    differentiation,
    eager,
    execution,
    value_checks,
)
from stillroom.pipeline.kernels.divergences import DivergenceName, Objective, TailName
from stillroom.pipeline.kernels.execution import Implementation
from stillroom.pipeline.kernels.packed_topk import PackedTargets, PackedTopk
from stillroom.pipeline.kernels.precision import wide
from stillroom.pipeline.kernels.targets import Targets
from stillroom.pipeline.kernels.vocabulary_shards import Shard


def topk_divergence(
    hidden: Tensor,
    unembedding: Tensor,
    ids: Tensor | PackedTopk,
    logprobs: Tensor | None = None,
    *,
    divergence: DivergenceName = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    tail: TailName = "bucket",
    tail_ids: Tensor | None = None,
    tail_weights: Tensor | None = None,
    temperature: float = 1.0,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    weights: Tensor | None = None,
    cross_entropy: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    impl: Implementation = "chunked",
    memory_budget: int | None = None,
    accumulate_fp32: bool = False,
    debug: bool | None = None,
    shard: Shard | None = None,
) -> Tensor:
    """Per-row divergence between a sparse teacher and `softmax(hidden @ unembedding.T)`.

    Computes `T**2 * D(p, softmax((hidden @ unembedding.T + bias) / T)) + ce_weight * cross_entropy`
    per row without holding [N, V] logits, with gradients for hidden, unembedding and bias.

    Args:
        hidden: [N, D] student states that the head reads; fp32, bf16, fp16 or fp64.
        unembedding: [V, D] head.
        ids: [N, k] teacher words, int32 or int64, distinct in a row; -1 is padding. Or the lists
            in the cache's packed form, ids and log-probabilities in one, and no `logprobs`: the
            `triton` sweep decodes them in registers.
        logprobs: [N, k] the teacher's full-softmax log-probabilities at `temperature`, nats.
        divergence: which; formulas in `divergences`.
        beta: mixture of `jsd`, in (0, 1).
        alpha: mixture of the skew divergences, in (0, 1).
        tail: what stands for the words outside ids; see the module.
        tail_ids: [N, n] words drawn from the tail (`sampled`), distinct; -1 is padding.
        tail_weights: [N, n] their weights, summing to the tail's mass.
        temperature: T; the loss is multiplied by T^2.
        labels: [N] next tokens for the cross-entropy; negative is none.
        ce_weight: weight of the cross-entropy (temperature 1, not multiplied by T^2).
        weights: [N] factors of the rows, which get no gradient. On the CPU (wherever hidden is),
            rows of weight 0 are left out before the first matrix product; on a device they only
            count 0.
        cross_entropy: fp32 [N], contiguous, to be filled with each row's own cross-entropy at
            temperature 1, before its weight; 0 without a label and where weights on the CPU are 0.
            Needs `ce_weight`; nothing is differentiated through it.
        bias: [V] of the head.
        softcap: cap of tanh soft-capped logits.
        valid_vocab: number of real words; head rows from there on are padding.
        impl: `eager` (the truth), `chunked` (torch, any device) or `triton` (CUDA).
        memory_budget: bytes for the buffers of one chunk of rows.
        accumulate_fp32: sum d_unembedding over chunks in fp32 (for bf16 and fp16 heads).
        debug: check ranges and values of tensors, which makes a device wait. None checks CPU
            tensors and, if the environment has STILLROOM_DEBUG_KERNELS=1, all others.
        shard: for a head sharded over ranks (not `eager`): which words `unembedding` holds.
            Everything else, ids included, is the same on all ranks; so is the loss. For heads that
            are DTensors see `distributed_head`.

    Returns:
        fp32 [N] (fp64 for fp64 inputs). Reduce it with `.sum()`: other reductions make the
        backward pass compute the chunks again.

    Raises:
        ValueError, TypeError: an argument that cannot mean what it says, named with row and value.
        RuntimeError: `triton` was asked for and cannot run.
    """
    objective = Objective(divergence, beta, alpha, tail, temperature, ce_weight, softcap)
    argument_checks.check_objective(objective, tail_ids, tail_weights)
    argument_checks.check_student(hidden, unembedding, bias)
    shard = argument_checks.check_words(unembedding, valid_vocab, shard, impl)
    argument_checks.check_rows(
        hidden, labels=labels, weights=weights, told=cross_entropy, ce_weight=ce_weight
    )
    argument_checks.check_how(impl, memory_budget)
    targets = replace(_targets(hidden, ids, logprobs, labels, weights), cross_entropy=cross_entropy)
    if tail_ids is not None and tail_weights is not None:
        argument_checks.check_sparse(hidden, "tail_ids", tail_ids, "tail_weights", tail_weights)
    if execution.debugging(debug, hidden):
        lists = targets.unpack()
        value_checks.check_lists(lists.ids, lists.logprobs, tail_ids, tail_weights, shard.total)
        value_checks.check_row_values(labels, weights, shard.total)
    if tail_ids is not None and tail_weights is not None:
        dtype = wide(hidden.dtype)
        targets = _with_draws(targets.unpack(), tail_ids, tail_weights, dtype)
        objective = replace(objective, tail="truncate")
    if impl == "eager":
        return eager.topk_divergence(hidden, unembedding, bias, targets, objective, shard.total)
    if execution.traced() and shard.group is None and isinstance(targets, Targets):
        how = objective, impl, shard.total, memory_budget, accumulate_fp32
        return compiled.divergence(hidden, unembedding, bias, targets, *how)
    return _fused(
        impl, hidden, unembedding, bias, targets, objective, shard, memory_budget, accumulate_fp32
    )


def _targets(
    hidden: Tensor,
    ids: Tensor | PackedTopk,
    logprobs: Tensor | None,
    labels: Tensor | None,
    weights: Tensor | None,
) -> Targets | PackedTargets:
    if isinstance(ids, PackedTopk):
        argument_checks.check_packed(hidden, ids, logprobs)
        return PackedTargets(ids, labels, weights)
    if logprobs is None:
        raise ValueError("logprobs: missing; expected [N, k] beside ids")
    argument_checks.check_sparse(hidden, "ids", ids, "logprobs", logprobs)
    return Targets(ids, logprobs.detach(), labels, weights)


def _with_draws(
    targets: Targets, tail_ids: Tensor, tail_weights: Tensor, dtype: torch.dtype
) -> Targets:
    """The tail's draws as further words of the support."""
    ids = torch.cat([targets.ids, tail_ids.to(targets.ids.dtype)], 1)
    drawn = tail_weights.detach().to(dtype).log()
    logprobs = torch.cat([targets.logprobs.to(dtype), drawn], 1)
    return replace(targets, ids=ids, logprobs=logprobs)


@execution.opaque
def _fused(
    impl: Implementation,
    hidden: Tensor,
    unembedding: Tensor,
    bias: Tensor | None,
    targets: Targets | PackedTargets,
    objective: Objective,
    shard: Shard,
    budget: int | None,
    accumulate_fp32: bool,
) -> Tensor:
    plan = execution.plan(
        execution.sparse_sweep(impl, hidden, shard),
        hidden,
        unembedding,
        targets,
        objective,
        shard,
        budget,
        accumulate_fp32,
        triton=impl == "triton",
    )
    return differentiation.divergence(hidden, unembedding, bias, plan)
