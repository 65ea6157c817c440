"""The load-balancing loss of a student with experts, on its routers' own logits.

One idea: experts that are never chosen are never trained, so routing has a loss of its own
(Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6): experts x the sum over experts of the share
of tokens they get and the share of probability they are given; 1 where routing is even. It is that
of a microbatch, as in transformers, and needs nothing of a cache.
"""

import torch

from stillroom.pipeline.config.strict import Table
from stillroom.pipeline.data.batch import DistillBatch, Teacher
from stillroom.pipeline.kernels.precision import widened
from stillroom.pipeline.objectives.registry import Context, Needs, Spec, register
from stillroom.pipeline.student.states import Routing, StudentStates

NAME = "load_balancing"


class BalancingOptions(Table):
    """Options of `load_balancing`: there are none; its weight is the config's coefficient."""


def unevenness(routing: Routing, real: torch.Tensor) -> torch.Tensor:
    """How uneven tokens and probability lie on the experts, over all blocks together.

    Args:
        routing: [T, experts] logits of every block.
        real: bool [T], tokens that are no padding.

    Returns:
        Scalar, float32 or, where the logits are, float64.
    """
    share = torch.stack([widened(logits).softmax(-1)[real] for logits in routing.logits])
    chosen = share.topk(routing.per_token, dim=-1).indices
    counts = torch.bincount(chosen.flatten(), minlength=routing.experts).to(share)
    rows = max(1, share.shape[0] * share.shape[1])
    return routing.experts * (counts / rows * share.sum(dim=(0, 1)) / rows).sum()


def real_tokens(batch: DistillBatch, states: StudentStates) -> torch.Tensor:
    """bool [T]: tokens of documents; padding has position 0 and no position 1 behind it."""
    positions = torch.nn.functional.pad(batch.position_ids, (0, 1))
    real = ((positions[:, :-1] > 0) | (positions[:, 1:] == 1)).flatten()
    if states.wide is None:
        return real
    layout = states.wide.layout
    wide = torch.zeros(layout.document.numel(), dtype=torch.bool, device=real.device)
    wide[layout.kept] = real
    wide[layout.inserted.flatten()] = True
    return wide


def _balancing(context: Context) -> torch.Tensor:
    assert context.states.routing is not None
    value = unevenness(context.states.routing, real_tokens(context.batch, context.states))
    return value * context.weights


def _has_rows(_options: BalancingOptions, batch: DistillBatch, _teacher: Teacher) -> torch.Tensor:
    """bool [E]: not of an example that was rejected, which is a single token."""
    return torch.bincount(batch.rows.example, minlength=len(batch.sources)) > 0


_NEEDS = Needs(routers=True)
register(
    Spec(NAME, "example", BalancingOptions, _balancing, lambda _: _NEEDS, applies=_has_rows),
)
