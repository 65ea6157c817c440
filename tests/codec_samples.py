"""Row signals for codec tests: dense softmax rows of a random teacher, cut to a record's signals.

One idea: rows are computed from logits over the whole vocabulary, so tails, entropies, ranks and
draws fit each other as a real teacher's do; `shape` bends the logits into the awkward cases.
"""

import numpy as np

from stillroom.cache_schemas.record_codec import MAX_KL, MEAN_KL, NAMES

SHAPES = ("peaked", "flat", "equal", "saturated", "masked")


def logits(rng: np.random.Generator, rows: int, vocab: int, shape: str) -> np.ndarray:
    """float64 [rows, vocab]."""
    z = rng.standard_normal((rows, vocab)) * (3.0 if shape == "peaked" else 0.5)
    if shape == "equal":
        z[:] = 1.0
    if shape in ("saturated", "masked"):
        z[:] = -1000.0 if shape == "saturated" else -np.inf
        z[np.arange(rows), rng.integers(0, vocab, rows)] = 0.0
    return z


def record(
    seed: int,
    rows: int,
    k: int,
    vocab: int,
    *,
    shape: str = "peaked",
    draws: int = 0,
    prompt: int = 1,
    nucleus: bool = False,
    temperatures: tuple[float, ...] = (1.0, 2.0),
) -> dict[str, np.ndarray]:
    """All row signals and the tokens of one example of `rows + prompt` tokens."""
    rng = np.random.default_rng(seed)
    z = logits(rng, rows, vocab, shape)
    lse = np.stack([_lse(z / t) for t in temperatures], axis=1)
    logp = z - _lse(z)[:, None]
    order = np.argsort(-logp, axis=1, kind="stable")
    likeliest, order = order[:, 0], order[:, :k]
    counts = rng.integers(1, k + 1, rows) if nucleus and k else np.full(rows, k)
    held = np.arange(k) < counts[:, None]
    ids = np.where(held, order, -1)
    listed = np.where(held, np.take_along_axis(logp, order, 1), -np.inf)
    tokens = rng.integers(0, vocab, rows + prompt)
    likely = rng.random(rows) < 0.8
    tokens[prompt:] = np.where(likely, likeliest, tokens[prompt:])
    token_logp = logp[np.arange(rows), tokens[prompt:]]
    mass = np.exp(logp)
    finite = np.isfinite(z)
    mean = np.where(finite, z, 0).sum(axis=1) / np.maximum(finite.sum(axis=1), 1)
    signals = {
        "topk_ids": ids,
        "topk_logprobs": listed,
        "tail_logprob": _log(np.clip(1 - np.exp(listed).sum(axis=1), 0, 1)),
        "token_ids": tokens,
        "token_logprob": token_logp,
        "token_rank": 1 + (logp > token_logp[:, None]).sum(axis=1),
        "entropy": -np.where(mass > 0, mass * np.where(mass > 0, logp, 0), 0).sum(axis=1),
        "lse": lse,
        "logit_mean": mean,
        "logit_std": np.abs(rng.standard_normal(rows)),
        "zscore_lse": rng.standard_normal(rows) + 8,
        "behaviour_logprob": token_logp / 2,
    }
    if draws:
        signals |= _drawn(rng, mass, ids, draws)
    return {
        n: a.astype(np.int32 if a.dtype.kind == "i" else np.float32) for n, a in signals.items()
    }


def _drawn(rng: np.random.Generator, mass: np.ndarray, ids: np.ndarray, draws: int) -> dict:
    """Draws from outside the list, in proportion to mass; none where nothing is outside."""
    tail = mass.copy()
    for row, listed in zip(tail, ids):
        row[listed[listed >= 0]] = 0
    drawn = np.full((len(mass), draws), -1)
    times = np.zeros((len(mass), draws), dtype=np.int64)
    for t, row in enumerate(tail):
        if row.sum() > 0:
            found, count = np.unique(
                rng.choice(row.size, draws, p=row / row.sum()), return_counts=True
            )
            drawn[t, : found.size], times[t, : found.size] = found, count
    return {"draw_ids": drawn, "draw_counts": times}


def _lse(z: np.ndarray) -> np.ndarray:
    top = z.max(axis=-1, initial=-1e300)
    return top + np.log(np.exp(z - top[..., None]).sum(axis=-1))


def _log(values: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(values)


def sorted_rows(signals: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(ids, logprobs) of the lists with every row in the order of its ids."""
    order = np.argsort(signals["topk_ids"], axis=1, kind="stable")
    return tuple(
        np.take_along_axis(signals[name], order, 1) for name in ("topk_ids", "topk_logprobs")
    )


def divergence(given: dict[str, np.ndarray], decoded: dict[str, np.ndarray]) -> np.ndarray:
    """KL(given || decoded) [R] over list and tail, both normalised, in float64 and by itself."""
    p, q = (
        np.exp(np.concatenate([sorted_rows(s)[1], s["tail_logprob"][:, None]], 1, dtype=np.float64))
        for s in (given, decoded)
    )
    p, q = p / p.sum(axis=1, keepdims=True), q / q.sum(axis=1, keepdims=True)
    return np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / np.where(q > 0, q, 1e-300)), 0).sum(1)


HALF_STEPS = {
    "token_logprob": 1 / 128,
    "entropy": 1 / 128,
    "lse": 1 / 128,
    "logit_mean": 1 / 128,
    "zscore_lse": 1 / 128,
    "behaviour_logprob": 1 / 512,
}
"""Stated bounds of the scalars in profile `small`; `strict` has a quarter."""
LOSSLESS = ("token_ids", "token_rank")


def assert_same(found: dict, expected: dict, names=NAMES) -> None:
    for name in names:
        if name in expected:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


LOGGED = ("topk_logprobs", "tail_logprob", "token_logprob", "entropy")
"""Decoded through the C library's exponential and logarithm."""


def assert_decoded(found: dict, expected: dict) -> None:
    """What another machine decoded; a name may have a path before it.

    Bit for bit, but for what went through a row's shift: a logarithm below 1 in size, whose last
    bit in float32 (2^-24) a C library may choose.
    """
    assert set(found) == set(expected)
    for name, array in expected.items():
        if name.split("/")[-1] in LOGGED:
            close = {"rtol": 2.0**-23, "atol": 2.0**-24}
            np.testing.assert_allclose(found[name], array, **close, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], array, err_msg=name)


def assert_draws(found: dict, expected: dict) -> None:
    for ids, times, given_ids, given_times in zip(
        found["draw_ids"], found["draw_counts"], expected["draw_ids"], expected["draw_counts"]
    ):
        held, given_held = ids >= 0, given_ids >= 0
        assert dict(zip(ids[held], times[held])) == dict(
            zip(given_ids[given_held], given_times[given_held])
        )
        assert (ids[held.sum() :] == -1).all()
        assert (times[~held] == 0).all()


def assert_within_bounds(profile: str, found: dict, expected: dict) -> None:
    ids, logprobs = sorted_rows(found)
    given_ids, given_logprobs = sorted_rows(expected)
    np.testing.assert_array_equal(ids, given_ids)
    assert_same(found, expected, LOSSLESS)
    if "draw_ids" in expected:
        assert_draws(found, expected)
    finer = 4 if profile == "strict" else 1
    for name, bound in HALF_STEPS.items():
        np.testing.assert_allclose(found[name], expected[name], atol=bound / finer, rtol=1e-6)
    np.testing.assert_allclose(found["logit_std"], expected["logit_std"], rtol=2.0**-10)
    if profile == "strict":
        near = given_logprobs > -1000
        assert (np.abs(logprobs[near] - given_logprobs[near]) <= 0.025 + 1e-5).all()
    else:
        assert (divergence(expected, found) <= MAX_KL * MEAN_KL + 1e-9).all()
