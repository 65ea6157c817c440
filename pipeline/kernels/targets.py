"""What rows are compared with: the teacher's ids and log-probabilities, labels, weights.

One idea: one value that can be cut into chunks of rows, so that a sweep sees only its own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Targets:
    """One entry per row.

    Attributes:
        ids: [N, k] words; negative is padding.
        logprobs: [N, k] teacher log-probabilities at the objective's temperature.
        labels: [N] or None; negative is no label.
        weights: [N] or None.
        cross_entropy: fp32 [N] that the sweep fills with -log q(label), or None.
    """

    ids: Tensor
    logprobs: Tensor
    labels: Tensor | None
    weights: Tensor | None
    cross_entropy: Tensor | None = None

    def __getitem__(self, rows: slice | Tensor) -> "Targets":
        labels = None if self.labels is None else self.labels[rows]
        weights = None if self.weights is None else self.weights[rows]
        part = None if self.cross_entropy is None else self.cross_entropy[rows]
        return Targets(self.ids[rows], self.logprobs[rows], labels, weights, part)

    def unpack(self) -> "Targets":
        """Itself: these lists are plain."""
        return self


def hard_weight(labels: Tensor | None, ce_weight: float, like: Tensor, words: int) -> Tensor:
    """Weight of each row's cross-entropy [C, 1]: 0 without a label, NaN for one beyond the words.

    `debug` names such a label; unchecked, loss and gradient say so.
    """
    if labels is None or not ce_weight:
        return like.new_zeros(len(like), 1)
    labels = labels[:, None]
    return ((labels >= 0).to(like) * ce_weight).masked_fill(labels >= words, torch.nan)
