"""Held-out text that the training split holds too, under another document's name.

One idea: the splits never share a document, but documents may quote one another. What is said in
the held-out examples is hashed in spans of a few tokens, and each is looked for in what is said in
the others; questions and system prompts, which many documents share, do not count.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from stillroom.pipeline.corpus.files import Corpus
from stillroom.pipeline.record import Example

SPAN = 16
"""Tokens: long enough that two texts do not share it by chance."""
KEPT_SPANS = 1 << 22
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def overlap(corpus: Corpus) -> dict[str, int]:
    """How much of the held-out answers is in the training split; see `between`."""
    return between(corpus.split("heldout"), corpus.split("train"))


def between(asked: Iterable[Example], others: Iterable[Example]) -> dict[str, int]:
    """How much of what is said in some examples is said in others, of the same tokenizer.

    Returns:
        `span`: tokens of a span; `spans`: how many of those asked about were looked for (all, or a
        sample of those that are rare enough to keep); `shared`: how many were found; `examples`:
        those asked about that have spans; `examples_shared`: of these, with half of them found, or
        more.
    """
    wanted = [_spans(example) for example in asked]
    known = np.unique(np.concatenate([*wanted, np.empty(0, np.uint64)]))
    known = known[:: max(1, len(known) // KEPT_SPANS)]
    found = _found(known, (_spans(example) for example in others))
    shares = [share for spans in wanted if (share := _share(spans, known, found)) is not None]
    return {
        "span": SPAN,
        "spans": len(known),
        "shared": int(found.sum()),
        "examples": len(shares),
        "examples_shared": sum(share >= 0.5 for share in shares),
    }


def _spans(example: Example) -> np.ndarray:
    """uint64 hashes of the runs of `SPAN` tokens that are all targets."""
    if len(example.token_ids) < SPAN:
        return np.empty(0, np.uint64)
    tokens = example.token_ids.astype(np.uint64) + np.uint64(1)
    count = len(tokens) - SPAN + 1
    hashes = np.zeros(count, np.uint64)
    for offset in range(SPAN):
        hashes = (hashes ^ tokens[offset : offset + count]) * MULTIPLIER
        hashes ^= hashes >> np.uint64(29)
    masked = np.concatenate([[0], np.cumsum(example.loss_mask)])
    return hashes[masked[SPAN:] - masked[:-SPAN] == SPAN]


def _found(known: np.ndarray, others: Iterator[np.ndarray]) -> np.ndarray:
    """Which of the sorted hashes `known` are among the others."""
    found = np.zeros(len(known), dtype=bool)
    for spans in others:
        at, there = _places(spans, known)
        found[at[there]] = True
    return found


def _share(spans: np.ndarray, known: np.ndarray, found: np.ndarray) -> float | None:
    """Share of an example's known spans that were found; None where it has none."""
    at, there = _places(spans, known)
    return float(found[at[there]].mean()) if there.any() else None


def _places(spans: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of spans in `known`, and whether they are there."""
    if not len(known):
        return np.empty(0, int), np.empty(0, bool)
    at = np.minimum(np.searchsorted(known, spans), len(known) - 1)
    return at, known[at] == spans
