"""Runs of characters as tokens: which tokens hold them, and where one cuts a token in two.

One idea: masks follow from character offsets alone, whoever made the tokens. What the characters
mean is not known here.
"""

from collections.abc import Iterable

import numpy as np


def inside(offsets: np.ndarray, spans: Iterable[tuple[int, int]]) -> np.ndarray:
    """Tokens [L] that hold a character of a span; offsets [L, 2] are theirs.

    Where a tokenizer joins the end of a prompt with an answer's beginning, that token is a target:
    it is the only one with which the answer can be said.
    """
    mask = np.zeros(len(offsets), dtype=bool)
    begins, ends = offsets[:, 0], offsets[:, 1]
    for start, end in spans:
        mask |= (begins < end) & (ends > start)
    return mask


def joints(offsets: np.ndarray, spans: Iterable[tuple[int, int]]) -> list[int]:
    """Beginnings of spans that lie inside a token."""
    begins, ends = offsets[:, 0], offsets[:, 1]  # [L], characters
    return [start for start, _ in spans if ((begins < start) & (ends > start)).any()]
