"""What is seen of work under way: on terminals of 60, 80 and 200 columns, and in a log file."""

import io
import time

import pytest
from rich.console import Console

from stillroom.stages import console
from stillroom.stages.progress_line import Pace, clock, line, log_line

NUMBERS = "loss 1.234  tok/s 1,530  held-out distilled 0.8812"


def under_way(every: float = 2.0, reports: int = 30, total: float | None = 100) -> tuple:
    """(pace, now) of work whose every unit takes `every` seconds, after `reports` of them."""
    pace = Pace(0.0)
    for number in range(reports + 1):
        pace.note(5.0 + every * number, float(number), total)
    return pace, 5.0 + every * reports


@pytest.mark.parametrize(
    ("width", "seen"),
    [
        (60, "train ━━━╌╌╌╌╌╌ 30/100 steps 2.0 s each 2:20 left loss 1.234"),
        (80, "train ━━━━━╌╌╌╌╌╌╌╌╌╌╌ 30/100 steps 2.0 s each 2:20 left loss 1.234  tok/s 1,530"),
        (
            200,
            f"train {'━' * 12}{'╌' * 28} 30/100 steps 2.0 s each 2:20 left {NUMBERS}",
        ),
    ],
)
def test_a_bar_at_every_width(width, seen):
    pace, now = under_way()
    assert line("train", "steps", pace, NUMBERS, now, width) == seen


@pytest.mark.parametrize("width", range(20, 121))
def test_count_and_time_left_stay_however_narrow(width):
    pace, now = under_way()
    seen = line("a title that is rather long", "examples", pace, NUMBERS, now, width)
    assert len(seen) <= width
    assert "30/100" in seen
    assert "2:20 left" in seen


def test_a_step_of_minutes_has_a_time_left_that_counts_down():
    pace, now = under_way(every=90.0, reports=3, total=10)
    assert pace.left(now) == 630
    assert pace.left(now + 60) == 570
    assert pace.left(now + 10_000) == 0
    assert "90.0 s each 10:30 left" in line("train", "steps", pace, "", now, 80)


def test_the_first_moments_have_no_rate():
    pace = Pace(0.0)
    for number in range(4):
        pace.note(100.0 + number * 0.01, 1000.0 * number, 10_000)
    assert pace.rate() is None
    assert line("capture", "tokens", pace, "", 100.03, 80).endswith("3,000/10,000 tokens 1:40")
    pace.note(104.0, 4000.0, 10_000)
    assert pace.rate() == 1000


def test_one_answer_of_many_side_by_side_is_no_rate():
    pace = Pace(0.0)
    pace.note(27.0, 0, 1969)
    pace.note(59.0, 1, 1969)
    assert pace.rate() is None
    pace.note(60.0, 60, 1969)
    assert pace.rate() == pytest.approx(60 / 33)


def test_neither_loading_nor_the_first_of_a_few_items_is_a_rate():
    """59 items that are answered together: the first is told 12 s before anything is known."""
    pace = Pace(0.0)
    pace.note(0.0, 0, 59)  # the teacher is being started
    pace.note(50.0, 0, 59)  # it scores
    pace.note(62.0, 1, 59)
    assert pace.left(62.0) is None
    pace.note(74.0, 2, 59)
    assert pace.left(74.0) == pytest.approx(57 * 12)


def test_batches_told_item_by_item_have_the_rate_of_batches():
    pace = Pace(0.0)
    pace.note(0.0, 0, 1969)
    for batch in range(5):
        for item in range(128):
            pace.note((batch + 1) * 61.0 + item * 0.001, batch * 128 + item + 1, 1969)
        assert pace.rate() == pytest.approx(128 / 61, rel=0.01)
    pace.note(366.0, 641, 1969)  # the first of the next batch comes late
    assert pace.rate() == pytest.approx(128 / 61, rel=0.5)


def test_slow_work_has_a_rate_after_a_few_reports():
    pace = Pace(0.0)
    for number in range(4):
        pace.note(number * 60.0, number, 100_000)
    assert pace.rate() == pytest.approx(1 / 60)


def test_a_rate_is_that_of_the_last_minute():
    pace = Pace(0.0)
    for second in range(600):
        pace.note(float(second), second * (1.0 if second < 300 else 10.0), None)
    assert pace.rate() == pytest.approx(10.0)


def test_an_unknown_total_is_not_shown():
    pace, now = under_way(total=None)
    assert line("prepare", "tokens", pace, "", now, 60) == "prepare 30 tokens 2.0 s each 1:05"
    assert log_line("prepare", "tokens", pace, "", now) == "prepare: 30 tokens  65 s"


def test_a_log_has_everything_in_one_line():
    pace, now = under_way()
    seen = log_line("train", "steps", pace, NUMBERS, now)
    assert seen == "train: 30/100 steps  65 s, about 140 s left  " + NUMBERS


@pytest.mark.parametrize("width", [60, 80, 200])
def test_what_a_terminal_gets_fits_it(width, monkeypatch):
    screen = io.StringIO()
    drawn = Console(file=screen, width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(console, "err", drawn)
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with console.progress("capture", "examples") as report:
        for number in range(30):
            now[0] += 10
            report(number, 100, tok_per_s=1530.2, bytes_per_token=0.0, mass=0.97)
            console.say("said beside it")
    last = screen.getvalue().replace("\r", "\n").split("\n")
    shown = [text for text in last if "29/100" in text]
    assert shown
    assert all(len(text) <= width + len("\x1b[2K") for text in shown)
    assert "29/100 examples" in shown[-1]
    assert "bytes/token" not in shown[-1]  # nothing is known of it yet


@pytest.mark.parametrize(("columns", "lines"), [("30", 2), ("60", 1), ("", 1)])
def test_a_table_in_a_pipe_is_as_wide_as_it_is_asked_to_be(columns, lines, monkeypatch, capsys):
    """And no figure is cut, however narrow it is."""
    monkeypatch.setenv("COLUMNS", columns)
    console.table("caches", ["cache", "holds", "bytes"], [["demo/cache", "87,656 tokens", "91.2"]])
    drawn = capsys.readouterr().out.splitlines()
    told = [line for line in drawn if line.startswith("│")]
    assert len(told) == lines
    assert all(word in " ".join(told) for word in ("demo/cache", "87,656", "tokens", "91.2"))


def test_without_colours_nothing_is_coloured(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    screen = io.StringIO()
    monkeypatch.setattr(console, "out", Console(file=screen, force_terminal=True, width=80))
    console.coloured([("learned", "bold green")])
    assert "\x1b[32m" not in screen.getvalue()
    assert "learned" in screen.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(42, "0:42"), (725, "12:05"), (11260, "3:07:40")])
def test_clocks(seconds, text):
    assert clock(seconds) == text
