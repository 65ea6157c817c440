"""How far two engines' answers to the same examples lie apart, in numbers.

One idea: log-probabilities in nats, on ids that both list; states as a share of the largest value
of the true ones. Judging is the caller's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from stillroom.pipeline.record import TeacherRecord

LOGPROBS = ("token_logprob", "lse", "entropy")


@dataclass(slots=True)
class Gap:
    """Differences of answers from the true ones.

    Attributes:
        logprob: largest of a log-probability, log-sum-exp or entropy, nats.
        squares, count: sum and number of the squared differences of log-probabilities.
        rows: positions that they are of; the values of one err together.
        hidden: dense signal -> largest difference over the largest true value.
    """

    logprob: float = 0.0
    squares: float = 0.0
    count: int = 0
    rows: int = 0
    hidden: dict[str, float] = field(default_factory=dict)

    @property
    def rms(self) -> float:
        """Root mean square of the differences of log-probabilities, nats."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    @property
    def furthest_hidden(self) -> float:
        """Largest of `hidden`; 0 where there is none."""
        return max(self.hidden.values(), default=0.0)

    def add(self, other: "Gap") -> None:
        """Take in those of more examples."""
        self.logprob = max(self.logprob, other.logprob)
        self.squares, self.count = self.squares + other.squares, self.count + other.count
        self.rows += other.rows
        for name, value in other.hidden.items():
            self.hidden[name] = max(self.hidden.get(name, 0.0), value)


def gap_between(found: Sequence[TeacherRecord], truth: Sequence[TeacherRecord]) -> Gap:
    """Differences of records from the true ones of the same examples."""
    total = Gap()
    for ours, theirs in zip(found, truth, strict=True):
        total.add(_of_record(ours, theirs))
    return total


def _of_record(ours: TeacherRecord, theirs: TeacherRecord) -> Gap:
    gap = Gap(rows=len(theirs.signals["topk_ids"]))
    for change in _changes(ours.signals, theirs.signals):
        if change.size:
            # NaN is as far away as can be.
            furthest = float(np.nan_to_num(np.abs(change), nan=np.inf).max())
            squares = float(np.square(change, dtype=np.float64).sum())
            gap.add(Gap(furthest, squares, change.size))
    for name, true in theirs.signals.items():
        if name.startswith("hidden.") and true.size:
            change = np.nan_to_num(np.abs(ours.signals[name] - true), nan=np.inf)
            gap.hidden[name] = float(change.max() / max(np.abs(true).max(), 1e-30))
    return gap


def _changes(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]):
    for name in LOGPROBS:
        if name in ours and name in theirs:
            yield (ours[name] - theirs[name]).ravel()
    same = ours["topk_ids"][:, :, None] == theirs["topk_ids"][:, None, :]
    row, mine, other = np.nonzero(same)
    yield ours["topk_logprobs"][row, mine] - theirs["topk_logprobs"][row, other]
