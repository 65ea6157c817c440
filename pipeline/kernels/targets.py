"""What rows are compared with: the teacher's ids and log-probabilities, labels, weights.

One idea: one value that can be cut into chunks of rows, so that a sweep sees only its own.
"""

from dataclasses import dataclass

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
