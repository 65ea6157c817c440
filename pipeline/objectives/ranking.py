"""Losses of recommenders as plain functions: BCE, DROS, and DLLM2Rec's ranking distillation.

One idea: every function gives one value per row and knows no model, so each can be compared with
its formula. Sources: DLLM2Rec (arXiv 2405.00338) and its authors' code; DROS (arXiv 2302.03735).
Where the code differs from the paper, the difference has a name here (`legacy_negatives`).
"""

import torch
import torch.nn.functional as F

TINY = 1e-8
"""Added to confidence and consistency, as in the authors' code."""


def next_item(
    positive: torch.Tensor, negative: torch.Tensor, legacy_negatives: bool = False
) -> torch.Tensor:
    """Binary cross-entropy of an item that came and one that did not.

    -log sigmoid(s+) - log(1 - sigmoid(s-)). The authors' code has -log sigmoid(1 - s-) for the
    second term (`legacy_negatives`), which is the right one at s- - 1.

    Args:
        positive, negative: scores of one shape.
    """
    shift = 1.0 if legacy_negatives else 0.0
    return F.softplus(-positive) + F.softplus(negative - shift)


def position_weights(ids: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """exp(-r / T) over its sum, r the place in the list: [B, K] of ids [B, K]."""
    places = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float64)
    return _normalised(torch.exp(-places / temperature).expand(ids.shape), ids)


def confidence_weights(
    distances: torch.Tensor, ids: torch.Tensor, temperature: float = 1.0, normalise: bool = True
) -> torch.Tensor:
    """exp(-d / T) + 1e-8, and over its sum if `normalise`: [B, K] of distances [B, K]."""
    raw = torch.exp(-distances.double() / temperature) + TINY
    return _normalised(raw, ids) if normalise else raw * (ids >= 0)


def consistency_weights(ids: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """1 + 1e-8 for items that the student ranks among its own best, else 1e-8; not normalised.

    Args:
        ids: int64 [B, K], the teacher's.
        own: int64 [B, K'], the student's.
    """
    agreed = (ids[:, :, None] == own[:, None, :]).any(dim=2)
    return (agreed.double() + TINY) * (ids >= 0)


def importance(
    parts: list[tuple[float, torch.Tensor]], ids: torch.Tensor, normalise: bool = True
) -> torch.Tensor:
    """Weighted sum of weights [B, K], over its own sum in each list if `normalise`."""
    total = torch.zeros(ids.shape, dtype=torch.float64, device=ids.device)
    for share, weights in parts:
        total = total + share * weights
    return _normalised(total, ids) if normalise else total


def uniform_weights(ids: torch.Tensor) -> torch.Tensor:
    """1 / K over each list."""
    return _normalised(torch.ones(ids.shape, dtype=torch.float64, device=ids.device), ids)


class Robust:
    """DROS over one batch of scores; the sums over the catalogue are made once for all items asked.

    log( sum_j exp(p_j s_j^2 / beta) - exp(p_y s_y^2 / beta) + exp(p_y (s_y - 1)^2 / beta) ), in
    logarithms throughout: only the largest term can be most of the sum, and the sum without that
    one is made by itself, so no difference is of two nearly equal numbers.

    Args:
        scores: [B, N].
        propensity: [N].
        beta: radius of the worst case.
    """

    def __init__(self, scores: torch.Tensor, propensity: torch.Tensor, beta: float = 1.0):
        self._scores, self._shares = scores, propensity / beta
        self._terms = self._shares * scores.square()
        largest, self._place = self._terms.max(dim=1, keepdim=True)
        others = self._terms.scatter(1, self._place, -torch.inf)
        self._rest = torch.logsumexp(others, dim=1, keepdim=True)
        self._every = torch.logaddexp(largest, self._rest)

    def of(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, K]: the value of each item y of ids int64 [B, K] in turn."""
        is_largest = ids == self._place
        share = torch.exp(
            (self._terms.gather(1, ids) - self._every).masked_fill(is_largest, -torch.inf)
        )
        without = torch.where(is_largest, self._rest, self._every + torch.log1p(-share))
        instead = self._shares[ids] * (self._scores.gather(1, ids) - 1).square()
        return torch.logaddexp(without, instead)


def propensity(counts: torch.Tensor, power: float = 0.05) -> torch.Tensor:
    """((count + 1) / sum of that) ** power: [N] of how often each item is a training target."""
    smoothed = counts.double() + 1
    return (smoothed / smoothed.sum()) ** power


def _normalised(weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Over the items that are there; 0 in a list without any."""
    kept = weights * (ids >= 0)
    return kept / kept.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
