"""The two parts of a line that has a cross-entropy in it, logged apart.

One idea: one sweep computes divergence and cross-entropy together, and tells the second beside
their sum; the first is what is left.
"""

from typing import Any

import torch

from stillroom.pipeline.kernels.precision import wide
from stillroom.pipeline.objectives.registry import Context


def labelled(context: Context, ce_weight: float) -> dict[str, Any]:
    """What a line with a cross-entropy in it gives the kernel: labels, and where it tells it.

    Args:
        context: of the line.
        ce_weight: its weight; 0 for none.
    """
    if not ce_weight:
        return {}
    labels = context.batch.labels
    told = torch.zeros(len(labels), dtype=wide(context.states.final.dtype), device=labels.device)
    return {"labels": labels, "ce_weight": ce_weight, "cross_entropy": told}


def keep_parts(context: Context, value: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
    """Leave the two parts of a line with a cross-entropy in it to be logged apart.

    Args:
        context: of the line.
        value: [N], what the line is trained on.
        given: from `labelled`, filled by the kernel.
    """
    if given:
        weights = context.weights.to(value.device)
        context.sums.update(
            cross_entropy=(weights * given["cross_entropy"]).sum(),
            both=value.detach().sum(),
            weight=weights.sum(),
            share=weights.sum() * given["ce_weight"],
        )
    return value


def parts(sums: dict[str, float]) -> dict[str, float]:
    """Means of a line's divergence and of its cross-entropy, from what `keep_parts` left."""
    weight = sums["weight"] or 1.0
    cross_entropy = sums["cross_entropy"] / weight
    divergence = sums["both"] / weight - sums["share"] / weight * cross_entropy
    return {"divergence": divergence, "cross_entropy": cross_entropy}
