"""Levels of log-probability: small steps where the mass is, larger ones where it is not.

One idea: a level of a = -log p is `step(a) = min(max_step, first_step * exp(gamma * a))` wide, so
that rare ids cost few bits and still add little KL divergence (the KL of one entry is about
p * step^2 / 24, equal for all entries at gamma = 1/2). With gamma = 0 all levels are equally wide
and |delta log p| is bounded everywhere. This module holds the levels; it codes nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

MAX_LEVELS = 65_000
GAMMA, SMALL_FLOOR = 0.4, 30.0
STRICT_STEP, STRICT_FLOOR = 0.05, 1000.0
MAX_STEP = 0.8
"""Width of the widest level at a budget of 1e-4 nats; it grows with the root of the budget."""
FIT_ROWS = 8192
FIT_SHARE = 0.92
"""Of the budget, for the samples: other rows may need a little more."""


@dataclass(frozen=True)
class Codebook:
    """Edges and centres of levels of a = -log p, in nats.

    Args:
        gamma: how fast levels widen.
        first_step: width of the level at p = 1.
        max_step: width that levels never exceed.
        floor: the last level ends here, or a little after; lower log-probabilities are stored as
            that level. One level more stands for p = 0 exactly.
    """

    gamma: float
    first_step: float
    max_step: float
    floor: float

    @cached_property
    def edges(self) -> np.ndarray:
        """float64 [levels + 1], ascending from 0."""
        edges = [0.0]
        while edges[-1] < self.floor and len(edges) <= MAX_LEVELS:
            width = self.first_step * math.exp(min(self.gamma * edges[-1], 700.0))
            edges.append(edges[-1] + min(self.max_step, width))
        return np.array(edges)

    @cached_property
    def logprobs(self) -> np.ndarray:
        """float32 [levels + 1]: the log-probability each level decodes to; the last is -inf."""
        centres = -(self.edges[1:] + self.edges[:-1]) / 2
        return np.append(centres, -np.inf).astype(np.float32)

    @property
    def zero_level(self) -> int:
        """The level of p = 0."""
        return len(self.edges) - 1

    def finer(self, times: int) -> "Codebook":
        """The same levels, each cut in two `times` times."""
        scale = 0.5**times
        return Codebook(self.gamma, self.first_step * scale, self.max_step * scale, self.floor)

    @classmethod
    def strict(cls) -> "Codebook":
        """Levels of one width."""
        return cls(0.0, STRICT_STEP, STRICT_STEP, STRICT_FLOOR)

    @classmethod
    def fit(cls, samples: Sequence[Mapping[str, np.ndarray]], mean_kl: float) -> "Codebook":
        """The widest levels that add at most `mean_kl` nats per row to the samples, on average."""
        from stillroom.cache_schemas.kernels.topk import mean_divergence

        widest = min(2.0, MAX_STEP * math.sqrt(mean_kl / 1e-4))
        lists = _sampled(samples)
        low, high = 1e-5, widest  # nats
        if not len(lists[0]):
            return cls(GAMMA, min(high, 1.2 * math.sqrt(mean_kl)), widest, SMALL_FLOOR)
        for _ in range(12):
            middle = math.sqrt(low * high)  # of logarithms: the widths span decades
            edges = cls(GAMMA, middle, widest, SMALL_FLOOR).edges
            low, high = (
                (middle, high)
                if mean_divergence(*lists, edges) <= FIT_SHARE * mean_kl
                else (low, middle)
            )
        return cls(GAMMA, round(low, 9), widest, SMALL_FLOOR)

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> "Codebook":
        """The inverse of `facts`.

        Raises:
            ValueError: numbers that are no codebook.
        """
        book = cls(**{name: float(facts[name]) for name in cls.__dataclass_fields__})
        widths = (1e-9 <= book.first_step <= book.max_step <= 100.0) and 0.0 <= book.gamma <= 10.0
        if not widths or not 0.0 < book.floor <= 1e5:
            raise ValueError(f"codebook {facts}")
        if book.edges[-1] < book.floor:
            raise ValueError(f"codebook {facts} has more than {MAX_LEVELS} levels")
        return book

    def facts(self) -> dict[str, float]:
        """The arguments, as JSON."""
        return asdict(self)


def _sampled(samples: Sequence[Mapping[str, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities [R, k] and tails [R] of at most FIT_ROWS rows, evenly spread."""
    total = sum(len(s["topk_logprobs"]) for s in samples)
    step = -(-max(total, 1) // FIT_ROWS)
    logprobs = [np.asarray(s["topk_logprobs"][::step], dtype=np.float32) for s in samples]
    tails = [
        np.asarray(s["tail_logprob"][::step], dtype=np.float32)
        if "tail_logprob" in s
        else np.full(len(rows), -np.inf, dtype=np.float32)
        for s, rows in zip(samples, logprobs)
    ]
    if not samples:
        return np.empty((0, 1), dtype=np.float32), np.empty(0, dtype=np.float32)
    return np.concatenate(logprobs), np.concatenate(tails)
