"""Columns of a student's head that the teacher does not have: their probability goes to zero.

One idea: a student whose head is wider than the teacher's says, in plain transformers, a softmax
over all of it. With m the mass on the further columns, forward KL over all of them is forward KL
over the teacher's plus -log(1 - m), because the teacher's p is zero there. Losses that are sums of
p log q get it by sweeping all columns; others compare what is left and have the term added, once
for each softmax in them. It knows nothing of tokens: columns that the teacher has too are learned
from the teacher.
"""

from torch import Tensor, zeros

from stillroom.pipeline.kernels.topk_divergence import topk_divergence
from stillroom.pipeline.objectives.registry import Context


def pushes_by_itself(divergence: str, tail: str) -> bool:
    """True for losses whose gradient, swept over all columns, is that of the full forward KL."""
    return divergence == "forward_kl" and tail != "bucket"


def push_off(
    context: Context,
    values: Tensor,
    ce_weight: float = 0.0,
    cross_entropy: Tensor | None = None,
) -> Tensor:
    """Rows' losses over the teacher's columns with what moves probability off the others.

    Args:
        context: of the line.
        values: [N], weighted losses.
        ce_weight: of a cross-entropy within them, which has a softmax of its own.
        cross_entropy: [N], unweighted, of the teacher's columns; becomes that of all columns.

    Returns:
        [N], weighted.
    """
    pushed = off_padding(context)
    if cross_entropy is not None and isinstance(pushed, Tensor):
        weights = context.weights.to(pushed)
        cross_entropy += (pushed.detach() / weights).where(weights > 0, 0.0)
    return values + (1 + ce_weight) * pushed


def off_padding(context: Context) -> Tensor | float:
    """-log(1 - m) of each row times its weight, float32 [N]; 0 where the heads are alike.

    It is the difference of two log-sum-exps, over all columns and over the teacher's: two sweeps.
    """
    head = context.states.head.weight
    if head.shape[0] <= context.cache.vocab_size:
        return 0.0
    return _minus_log(context, head.shape[0]) - _minus_log(context, context.cache.vocab_size)


def _minus_log(context: Context, columns: int) -> Tensor:
    """-log q of id 0 over the first columns; the id's own logit falls out of the difference."""
    head, rows = context.states.head, context.batch.rows.flat
    hidden = context.states.at(rows)
    ids = zeros((len(rows), 1), dtype=rows.dtype, device=hidden.device)
    return topk_divergence(
        hidden,
        head.weight,
        ids,
        zeros(ids.shape, device=hidden.device),
        weights=context.weights,
        bias=head.bias,
        softcap=head.softcap,
        divergence="forward_kl",
        tail="truncate",
        valid_vocab=columns,
        impl=context.kernel,
    )
