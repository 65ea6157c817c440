"""Whether the lists of a source are about the tokens that they stand at.

One idea: a teacher finds the tokens of a text likelier than their neighbours, so lists that give a
neighbour far more than the token itself were laid one place off: a missing or added first token, or
a writer who counts rows from the token before. One text says little; all rows of a source are asked
together. It changes nothing.
"""

from dataclasses import dataclass, field

import numpy as np

SHIFTS = (-2, -1, 1, 2)
LEAST_ROWS = 32
LEAST_RATIO = 2.0
"""How many times as likely one of a token and its neighbour must be as the other."""
LEAST_SIGMAS = 6.0
"""How many of its standard errors the mean difference must be."""


@dataclass
class Alignment:
    """Sums over the rows of a source, for each shift."""

    rows: np.ndarray = field(default_factory=lambda: np.zeros(len(SHIFTS)))
    own: np.ndarray = field(default_factory=lambda: np.zeros(len(SHIFTS)))
    there: np.ndarray = field(default_factory=lambda: np.zeros(len(SHIFTS)))
    squares: np.ndarray = field(default_factory=lambda: np.zeros(len(SHIFTS)))

    def add(self, tokens: np.ndarray, first_row: int, ids: np.ndarray, logprobs: np.ndarray):
        """One text.

        Args:
            tokens: int [L].
            first_row: row t is about token t + 1.
            ids: int [R, k].
            logprobs: float [R, k].
        """
        about = np.arange(first_row + 1, len(tokens))
        own = _given(tokens[about], ids, logprobs)  # [R]
        for number, shift in enumerate(SHIFTS):
            inside = (about + shift >= 0) & (about + shift < len(tokens))
            there = _given(tokens[about[inside] + shift], ids[inside], logprobs[inside])
            self.rows[number] += len(there)
            self.own[number] += own[inside].sum()
            self.there[number] += there.sum()
            self.squares[number] += np.square(there - own[inside]).sum()

    def off(self) -> tuple[int, float, float] | None:
        """(places, probability given to the tokens there, to the rows' own), means over rows, where
        the lists are about other tokens; None where they are not."""
        rows = np.maximum(self.rows, 1)
        gain = (self.there - self.own) / rows
        error = np.sqrt(np.maximum(self.squares / rows - gain**2, 1e-12) / rows)
        found = (
            (self.rows >= LEAST_ROWS)
            & (self.there > LEAST_RATIO * self.own)
            & (gain > LEAST_SIGMAS * error)
        )
        if not found.any():
            return None
        at = int(np.argmax(np.where(found, gain, -1)))
        return SHIFTS[at], float(self.there[at] / rows[at]), float(self.own[at] / rows[at])

    def seen(self) -> bool:
        """Whether the lists give their own tokens so much more that they cannot be about others."""
        enough = bool((self.rows >= LEAST_ROWS).all())
        return enough and bool((self.own > LEAST_RATIO * self.there).all())


def _given(tokens: np.ndarray, ids: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
    """float64 [R]: the probability that each list gives to a token; 0 where it does not name it."""
    return np.where(ids == tokens[:, None], np.exp(logprobs.astype(np.float64)), 0.0).sum(axis=1)
