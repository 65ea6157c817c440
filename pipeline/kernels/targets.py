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
    """

    ids: Tensor
    logprobs: Tensor
    labels: Tensor | None
    weights: Tensor | None

    def __getitem__(self, rows: slice | Tensor) -> "Targets":
        labels = None if self.labels is None else self.labels[rows]
        weights = None if self.weights is None else self.weights[rows]
        return Targets(self.ids[rows], self.logprobs[rows], labels, weights)

    def unpack(self) -> "Targets":
        """Itself: these lists are plain."""
        return self
