"""Runs of characters as tokens: which tokens hold them, and where one cuts a token in two.

One idea: masks follow from character offsets alone, whoever made the tokens. Tokens stand in the
order of their text, so those of a run are found by halving, and few offsets are asked for. What the
characters mean is not known here.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence

import numpy as np

Place = Callable[[int], tuple[int, int]]
"""Token -> the characters (begin, end) that it holds; both grow with the token."""


def runs_of(
    place: Place, count: int, spans: Iterable[tuple[int, int]]
) -> tuple[np.ndarray, list[int]]:
    """What `inside` and `joints` say, for the offsets of `count` tokens asked for one by one."""
    mask, joined = np.zeros(count, dtype=bool), []
    tokens: Sequence[int] = range(count)
    for start, end in spans:
        first = bisect_right(tokens, start, key=lambda token: place(token)[1])
        beyond = bisect_left(tokens, end, lo=first, key=lambda token: place(token)[0])
        mask[first:beyond] = True
        if first < count and place(first)[0] < start:
            joined.append(start)
    return mask, joined


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
