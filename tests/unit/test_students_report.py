"""The report of the students' grids: pairing, errors, and what is said of arms run once."""

import json

import pytest

from benchmarks._students_report import report
from stillroom.cache_schemas.errors import ConfigError

KL = {"full": {1: 2.0, 2: 4.0}, "bucket-20": {1: 2.2, 2: 4.2, 3: 9.0}, "random-20": {3: 5.0}}


@pytest.fixture
def cells(tmp_path):
    (tmp_path / "tail").mkdir()
    for arm, seeds in KL.items():
        for seed, kl in seeds.items():
            facts = {"arm": arm, "seed": seed, "steps": 36, "tokens": 72000, "k": 9, "draws": 0}
            facts |= {"bytes_per_token": 20.25, "kl": kl, "top1": 0.3, "perplexity": 100.0}
            (tmp_path / "tail" / f"{arm}-36-{seed}.json").write_text(json.dumps(facts))
    return tmp_path


def test_arms_are_compared_over_the_seeds_that_both_have(cells):
    rows = {row["arm"]: row for row in report(cells, "tail")["rows"]}
    assert rows["bucket-20"]["kl"] == pytest.approx((2.2 + 4.2 + 9.0) / 3)
    assert rows["bucket-20"]["seeds"] == 3
    assert rows["bucket-20"]["relative_to_full"] == pytest.approx((0.1 + 0.05) / 2)
    assert rows["bucket-20"]["relative_to_full_standard_error"] == pytest.approx(0.025)
    assert rows["full"]["relative_to_full"] == 0
    assert rows["random-20"]["relative_to_full"] is None


def test_what_was_run_once_has_no_error(cells):
    report(cells, "tail")
    lines = (cells / "tail.md").read_text().splitlines()
    assert lines[2].startswith("| `full` | 72,000 | 2 | - | 3.000 ± 1.000 | +0.0% ± 0.0% |")
    assert "| `random-20` | 72,000 | 1 | 20.2 | 5.000 | - | 0.300 | 100 |" in lines
    assert (cells / "tail.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_of_nothing_says_what_to_run(tmp_path):
    with pytest.raises(ConfigError, match=r"no cell has been run.*students --grid tail"):
        report(tmp_path, "tail")
