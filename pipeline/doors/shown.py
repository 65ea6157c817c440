"""What a trainer's log says of each objective since the line before.

One idea: what is shown is of the same steps as the trainer's own `loss`: it begins anew whenever
the trainer does, be it a second `train()` or a smaller batch after memory ran out. It adds up
values that were computed elsewhere.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from stillroom.pipeline.objectives.combine import Distiller
from stillroom.pipeline.objectives.reporting import reports_of


class Shown:
    """Sums of the objectives' values.

    Args:
        distiller: whose objectives.

    Attributes:
        steps: that were begun since the last line.
    """

    def __init__(self, distiller: Distiller):
        self._distiller, self.steps = distiller, 0
        self._sums = torch.zeros(len(distiller.terms), dtype=torch.float64)

    def add(self, values: torch.Tensor, done: float) -> None:
        """One microbatch's contributions, before their weights.

        Args:
            values: [objectives].
            done: share of the run that is done.
        """
        weights = [term.weight(done) or 1.0 for term in self._distiller.terms]
        own = values.detach().double()
        self._sums = self._sums.to(own.device) + own / own.new_tensor(weights)

    def take(self, add_up: Callable[[torch.Tensor], torch.Tensor], ranks: int) -> dict[str, float]:
        """Means over the steps since the last line; the sums begin anew.

        Args:
            add_up: the sum of a CPU tensor over all ranks.
            ranks: their number.
        """
        if not self.steps:
            return {}
        means = (add_up(self._sums.cpu()) / ranks / self.steps).tolist()
        reports, _ = reports_of(self._distiller, add_up)
        self._clear()
        labels = [term.label for term in self._distiller.terms]
        told = {f"objective/{label}": mean for label, mean in zip(labels, means)}
        return told | {f"report/{name}": value for name, value in reports.items()}

    def begin_anew(self) -> TrainerCallback:
        """Forgets the sums where a trainer begins."""
        shown = self

        class BeginsAnew(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                shown._clear()

        return BeginsAnew()

    def _clear(self) -> None:
        self._sums, self.steps = torch.zeros_like(self._sums), 0
        self._distiller.sums.clear()
