"""KL divergence between rows as they were given and as a layout returns them.

One idea: the k listed ids and their tail are k + 1 outcomes, so layouts with and without a stored
tail are measured alike.
"""

import numpy as np

NEVER_LESS = 1e-30


def row_kl(given: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> np.ndarray:
    """KL(given || decoded) [R] in nats of a record with a tail of its own."""
    return divergence(given, found["topk_ids"], found["topk_logprobs"], found["tail_logprob"])


def divergence(
    given: dict[str, np.ndarray], ids: np.ndarray, logprobs: np.ndarray, tail: np.ndarray
) -> np.ndarray:
    """KL(given || decoded) [R] in nats over list and tail, both normalised."""
    order, own = np.argsort(given["topk_ids"], axis=1), np.argsort(ids, axis=1, kind="stable")
    if not (
        np.take_along_axis(ids, own, 1) == np.take_along_axis(given["topk_ids"], order, 1)
    ).all():
        raise AssertionError("a layout changed the ids")
    p = _distribution(np.take_along_axis(given["topk_logprobs"], order, 1), given["tail_logprob"])
    q = _distribution(np.take_along_axis(logprobs, own, 1), tail)
    return (p * np.log(np.maximum(p, NEVER_LESS) / np.maximum(q, NEVER_LESS))).sum(axis=1)


def _distribution(logprobs: np.ndarray, tail: np.ndarray) -> np.ndarray:
    mass = np.exp(np.concatenate([logprobs, tail[:, None]], axis=1, dtype=np.float64))
    return mass / mass.sum(axis=1, keepdims=True)
