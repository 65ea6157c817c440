"""How far rounding alone may put two engines apart, by the number of rows it is judged on."""

import numpy as np
import pytest

from stillroom.pipeline.record import Example, content_id
from stillroom.pipeline.teacher.agreement import Gap
from stillroom.pipeline.teacher.checked_texts import ROWS, choose, without_further
from stillroom.pipeline.teacher.rounding import TIMES_RMS, by_chance, faults

SMALL = 1e-4


def gap(values) -> Gap:
    """Of values [rows, 3], the three of a row alike."""
    return Gap(
        float(np.abs(values).max()), float(np.square(values).sum()), values.size, len(values)
    )


def rounding(random, rows, scale=0.1):
    """[rows, 3]: a row's state errs, and its log-probabilities with it."""
    return random.normal(size=(rows, 1)) * np.ones(3) * scale


@pytest.mark.parametrize(("rows", "of"), [(1, 7), (1, 65), (7, 7), (7, 65), (65, 65)])
def test_two_engines_that_round_equally_are_never_told_apart(rows, of):
    random = np.random.default_rng(0)
    for _ in range(4000):
        assert faults(gap(rounding(random, rows)), gap(rounding(random, of)), SMALL) == []


@pytest.mark.parametrize(
    ("rows", "of", "quantile"),
    [(8, 158, 2.45), (20, 20, 3.25), (30, 30, 2.54), (65, 65, 1.84), (150, 160, 1.47)],
)
def test_the_approximation_is_near_fishers_quantile(rows, of, quantile):
    """Roots of scipy.stats.f.isf(1.017e-6, rows, of)."""
    assert by_chance(rows, of) == pytest.approx(quantile, rel=0.04)


def test_over_many_rows_chance_allows_nothing_more():
    assert by_chance(ROWS, ROWS) < TIMES_RMS
    random = np.random.default_rng(1)
    noise = gap(rounding(random, ROWS))
    far = gap(rounding(random, ROWS, scale=0.4))
    (told,) = faults(far, noise, SMALL)
    assert told.startswith("log-probabilities differ by 0.")
    assert f"on average over {ROWS} rows (limit {TIMES_RMS * noise.rms:.3g})" in told


def test_every_figure_beyond_its_limit_is_told():
    noise = Gap(0.1, 64 * 0.05**2, 64, 64, {"hidden.final": 0.01, "hidden.1": 0.01})
    far = Gap(0.7, 64 * 0.2**2, 64, 64, {"hidden.final": 0.07, "hidden.1": 0.05})
    assert faults(far, noise, SMALL) == [
        "log-probabilities differ by up to 0.7 nats (limit 0.6)",
        "log-probabilities differ by 0.2 nats on average over 64 rows (limit 0.15)",
        "hidden.final differs by 0.07 of its largest value (limit 0.06)",
    ]


def test_in_float32_small_is_the_limit():
    off = Gap(2e-4, 3 * 1e-4**2, 3, 1)
    (told,) = faults(off, Gap(), SMALL)
    assert told == "log-probabilities differ by up to 0.0002 nats (limit 0.0001)"


def titles(count: int, tokens: int) -> list[Example]:
    mask = np.arange(tokens) == tokens - 1
    made = [np.arange(n, n + tokens, dtype=np.int32) for n in range(count)]
    return [Example(content_id(ids, mask), "title", "item", ids, mask) for ids in made]


@pytest.mark.parametrize(("count", "tokens", "rows"), [(60, 3, 61), (5000, 2, 64), (7, 3, 8)])
def test_short_texts_are_compared_in_numbers(count, tokens, rows):
    chosen = choose(titles(count, tokens))
    assert sum(one.num_rows for one in chosen.values()) == rows
    assert without_further(chosen).keys() == {"shortest", "longest"}
