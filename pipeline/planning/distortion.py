"""What a setting of a cache does to the gradient that a student gets.

One idea: everything follows from long lists of the teacher, cut to what the setting would keep.

**Gradient error.** The gradient of cross-entropy in the student's logits is q - p, so a stored
target t in place of p changes it by t - p. Its *bias* is the root mean square, over rows, of
|| E[t] - p ||; its *noise* that of the standard deviation of t. With a tail bucket, t spreads the
tail's mass like the corpus's mean distribution: a student that knows how common ids are. With N
systematic draws of the tail (mass P, shares s), E[t] = p and the variance at an id is
(P / N)^2 f (1 - f), f what N s has after the point: it is drawn floor(N s) times or once more.
"""

import numpy as np

from stillroom.pipeline.teacher.rows import ROUNDING

Signals = dict[str, np.ndarray]


def gradient(
    rows: list[Signals], k: int, draws: int, usual: np.ndarray, found: list[Signals]
) -> tuple[float, float]:
    """(bias, noise) over rows, of the tail's treatment and of the coding together."""
    bias, noise = [], []
    for signals, decoded in zip(rows, found):
        p = np.exp(signals["topk_logprobs"], dtype=np.float64)  # [R, n]
        tail = np.maximum(1 - p[:, :k].sum(axis=1), 1e-12)  # [R]
        if draws:
            noise.append(_draw_noise(p[:, k:], tail, draws))
            missed = np.zeros(len(p))
        else:
            noise.append(np.zeros(len(p)))
            missed = _bucket_error(signals["topk_ids"], p, k, tail, usual)
        bias.append(missed + _coding_error(signals, decoded))
    squares = np.concatenate(bias).mean(), np.concatenate(noise).mean()
    return float(np.sqrt(squares[0])), float(np.sqrt(squares[1]))


def num_draws(tail: np.ndarray, draws: int) -> np.ndarray:
    """int64 [R]: draws of rows whose tails weigh `tail` [R]; see `definition.draw_tail`."""
    return np.clip(np.ceil(draws * tail - ROUNDING), 1, draws).astype(np.int64)


def _draw_noise(p: np.ndarray, tail: np.ndarray, draws: int) -> np.ndarray:
    """Variance [R] of the draws' estimate of the tail; an id beyond the long list is far too rare
    to be drawn twice."""
    step = tail / num_draws(tail, draws)  # [R], mass that one draw stands for
    times = p / step[:, None]  # [R, n], expected draws of each id
    rounded = times - np.floor(times)
    unlisted = np.maximum(tail - p.sum(axis=1), 0)
    return step**2 * (rounded * (1 - rounded)).sum(axis=1) + step * unlisted


def _bucket_error(
    ids: np.ndarray, p: np.ndarray, k: int, tail: np.ndarray, usual: np.ndarray
) -> np.ndarray:
    """Squared error [R] of spreading the tail's mass like `usual` over the ids outside the list."""
    # Sum of (p - spread u)^2 over the ids outside the list, multiplied out.
    squares = (p[:, k:] ** 2).sum(axis=1)
    listed = usual[ids[:, :k]]
    outside = np.maximum(1 - listed.sum(axis=1), 1e-12)
    spread = tail / outside
    crossed = (p[:, k:] * usual[ids[:, k:]]).sum(axis=1)
    usual_squares = (usual**2).sum() - (listed**2).sum(axis=1)
    return np.maximum(squares - 2 * spread * crossed + spread**2 * usual_squares, 0)


def _coding_error(signals: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> np.ndarray:
    """Squared error [R] of the listed probabilities."""
    k = found["topk_ids"].shape[1]
    given_order = np.argsort(signals["topk_ids"][:, :k], axis=1)
    found_order = np.argsort(found["topk_ids"], axis=1)
    given = np.take_along_axis(signals["topk_logprobs"][:, :k], given_order, 1)
    stored = np.take_along_axis(found["topk_logprobs"], found_order, 1)
    return ((np.exp(given, dtype=np.float64) - np.exp(stored, dtype=np.float64)) ** 2).sum(axis=1)


def cut(signals: Signals, k: int, draws: int, vocab_size: int, seed: int) -> Signals:
    """The record that a capture with lists of `k` and `draws` draws would give."""
    p = np.exp(signals["topk_logprobs"], dtype=np.float64)
    tail = np.maximum(1 - p[:, :k].sum(axis=1), 1e-12)
    record = signals | {
        "topk_ids": np.ascontiguousarray(signals["topk_ids"][:, :k]),
        "topk_logprobs": np.ascontiguousarray(signals["topk_logprobs"][:, :k]),
        "tail_logprob": np.log(tail).astype(np.float32),
    }
    if draws:
        rng = np.random.default_rng(seed)
        record |= drawn(signals["topk_ids"][:, k:], p[:, k:], tail, draws, vocab_size, rng)
    return record


def drawn(
    ids: np.ndarray,
    p: np.ndarray,
    tail: np.ndarray,
    draws: int,
    others: int | np.ndarray,
    rng: np.random.Generator,
) -> Signals:
    """Systematic draws from tails that are known by lists.

    Args:
        ids, p: [R, n] listed ids of the tails and their probabilities.
        tail: [R] mass of the tails, listed or not.
        draws: of a row whose tail is everything.
        others: what a draw beyond the list may be, one id as likely as another, which costs more
            bytes than real draws would; a number is all ids below it.
    """
    found = np.full((len(p), draws), -1, dtype=np.int32)
    counts = np.zeros_like(found)
    shares = np.cumsum(p, axis=1) / tail[:, None]  # [R, n]
    for t, count in enumerate(num_draws(tail, draws)):
        places = np.searchsorted(shares[t], (rng.random() + np.arange(count)) / count)
        listed = np.append(ids[t], -1)[places]
        chosen = np.where(listed >= 0, listed, rng.choice(others, count))
        distinct, times = np.unique(chosen, return_counts=True)
        found[t, : distinct.size], counts[t, : distinct.size] = distinct, times
    return {"draw_ids": found, "draw_counts": counts}


def mean_distribution(rows: list[Signals], vocab_size: int) -> np.ndarray:
    """float64 [vocab]: the listed probability of every id, averaged over rows."""
    total = np.zeros(vocab_size)
    for signals in rows:
        p = np.exp(signals["topk_logprobs"], dtype=np.float64)
        total += np.bincount(signals["topk_ids"].ravel(), p.ravel(), minlength=total.size)
    return total / max(total.sum(), 1e-12)
