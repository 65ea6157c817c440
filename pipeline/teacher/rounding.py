"""How far apart rounding alone may put two engines of one model, and what is beyond that.

One idea: two engines that compute one definition in one precision round differently and equally
much, so how far transformers itself is off in that precision is the measure, and a bound also
follows from how many numbers it is made of: over a few rows a mean says little, over many it is
sharp. It asks no engine.
"""

import math

from stillroom.pipeline.teacher.agreement import Gap

TIMES_MAX, TIMES_RMS = 6.0, 3.0
"""How many times as far as transformers in the same precision, at most and on average over many
rows."""
DEVIATIONS = 4.75
"""Standard deviations of a normal distribution that one value in a million exceeds."""


def faults(gap: Gap, noise: Gap, small: float) -> list[str]:
    """Every figure that rounding does not explain, in words, beside its limit.

    Args:
        gap: an engine from the definition in float32, on some rows.
        noise: the definition in the engine's precision from the same; empty in float32.
        small: nats, or share of a state, that are nothing in any precision.
    """
    most = max(small, TIMES_MAX * noise.logprob)
    mean = small
    if noise.rms:
        mean = max(small, noise.rms * max(TIMES_RMS, by_chance(gap.rows, noise.rows)))
    found = []
    if gap.logprob > most:
        found.append(f"log-probabilities differ by up to {gap.logprob:.3g} nats (limit {most:.3g})")
    if gap.rms > mean:
        over = f"on average over {gap.rows} rows (limit {mean:.3g})"
        found.append(f"log-probabilities differ by {gap.rms:.3g} nats {over}")
    for name, value in gap.hidden.items():
        allowed = max(small, TIMES_MAX * noise.hidden.get(name, 0.0))
        if value > allowed:
            share = f"{value:.3g} of its largest value (limit {allowed:.3g})"
            found.append(f"{name} differs by {share}")
    return found


def by_chance(rows: int, of: int) -> float:
    """How many times the root mean square over `of` rows that over `rows` others may be, where both
    are equally wide; exceeded once in a million.

    The values of one row (its log-sum-exp, the log-probabilities below it) come from one hidden
    state and err together, so it is rows that count as independent. The ratio of two mean squares
    is then distributed as Fisher's F with `rows` and `of` degrees of freedom; its quantile by
    Paulson's approximation (1942), with the cube roots of both taken for normal. Infinite where
    `of` is so small that it bounds nothing: there the largest difference alone is judged.
    """
    if not rows or not of:
        return math.inf
    a, b, z = 2 / (9 * rows), 2 / (9 * of), DEVIATIONS
    below = (1 - b) ** 2 - b * z**2
    if below <= 0:
        return math.inf
    spread = (1 - b) ** 2 * a + (1 - a) ** 2 * b - a * b * z**2
    return (((1 - a) * (1 - b) + z * math.sqrt(spread)) / below) ** 1.5
