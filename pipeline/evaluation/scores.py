"""What was measured of one model: sums by example, and means with their errors.

One idea: rows of one example are not independent, so the example is the unit of every error, and
its sums are kept: two models on the same examples are compared example by example, where most of
what makes a text hard cancels. Nothing is run here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Scores:
    """One model on a text; every figure is a mean over the same rows.

    Attributes:
        kl: KL(teacher || model) over the full vocabulary, nats per token; 0 for the teacher.
        kl_standard_error: of that mean, over examples.
        top1: share of rows where the most probable token is the teacher's.
        perplexity: exp of the mean -log p of the text's own tokens.
        parameters: of the model.
        no_token: probability on ids that no token has, mean over rows.
        top1_standard_error, perplexity_standard_error: over examples.
        by_example: "rows", and sums over each example's rows of "kl", "hits" and "nll".
        reverse_kl: KL(model || teacher) over the columns that both heads have, the model's
            distribution scaled to one there: what training on reverse KL lowers.
    """

    kl: float
    kl_standard_error: float
    top1: float
    perplexity: float
    parameters: int
    no_token: float
    top1_standard_error: float
    perplexity_standard_error: float
    by_example: dict[str, list[float]]
    reverse_kl: float


@dataclass
class Sums:
    """Running sums of one model."""

    parameters: int
    by_example: dict[str, list[float]] = field(
        default_factory=lambda: {"rows": [], "kl": [], "hits": [], "nll": []}
    )
    no_token: float = 0.0
    reverse_kl: float = 0.0

    def add(
        self,
        kl: torch.Tensor,
        hits: torch.Tensor,
        nll: torch.Tensor,
        no_token: torch.Tensor,
        reverse_kl: torch.Tensor,
    ) -> None:
        """Add an example; every tensor is [rows]."""
        self.no_token += float(no_token.double().sum())
        self.reverse_kl += float(reverse_kl.double().sum())
        self.by_example["rows"].append(len(kl))
        for name, values in (("kl", kl), ("hits", hits), ("nll", nll)):
            self.by_example[name].append(float(values.double().sum()))

    def mean_kl(self) -> float:
        """So far."""
        return sum(self.by_example["kl"]) / sum(self.by_example["rows"])

    def scores(self) -> Scores:
        """Means and errors."""
        rows = self.by_example["rows"]
        (kl, kl_error), (top1, top1_error), (nll, nll_error) = (
            mean_and_error(self.by_example[name], rows) for name in ("kl", "hits", "nll")
        )
        return Scores(
            kl=kl,
            kl_standard_error=kl_error,
            top1=top1,
            perplexity=exp(nll),
            parameters=self.parameters,
            no_token=self.no_token / sum(rows),
            top1_standard_error=top1_error,
            perplexity_standard_error=exp(nll) * nll_error,  # to first order
            by_example=self.by_example,
            reverse_kl=self.reverse_kl / sum(rows),
        )


def mean_and_error(sums: Sequence[float], rows: Sequence[float]) -> tuple[float, float]:
    """Mean over rows of what is known by its sums over examples, and its standard error: that of a
    ratio estimator, whose independent units, the examples, are of unequal size."""
    values, weights = np.asarray(sums, np.float64), np.asarray(rows, np.float64)
    total = weights.sum()
    mean = values.sum() / total
    return float(mean), float(np.sqrt(((values - mean * weights) ** 2).sum()) / total)
