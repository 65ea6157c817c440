"""How every stage talks: progress on stderr, results on stdout, one style.

One idea: on a terminal a live bar, otherwise a plain line now and then, so that a log file of a
ten-hour job stays readable. The pipeline reports numbers through a callback and never draws.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

SECONDS_BETWEEN_LINES = 15.0

out = Console()
err = Console(stderr=True)


class Report(Protocol):
    """What a stage calls with its newest numbers."""

    def __call__(self, done: float, total: float | None, **numbers: float | str) -> None:
        """Work done, all the work where it is known (in the bar's unit), and further numbers."""
        ...


def say(message: str) -> None:
    """One line for a person; stderr, so that stdout holds results only."""
    err.print(message, highlight=False, markup=False, soft_wrap=True)


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A small result table on stdout; numbers are right-aligned."""
    made = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        made.add_row(*row)
    out.print(made)


@contextmanager
def progress(title: str, unit: str = "tokens") -> Iterator[Report]:
    """Show one piece of work: bar, count, rate, time left and the caller's own numbers."""
    if not err.is_terminal:
        yield _Lines(title, unit)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        _Count(unit),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}", style="dim"),
    )
    with Progress(*columns, console=err) as drawn:
        task = drawn.add_task(title, total=None, numbers="")

        def report(done: float, total: float | None, **numbers: float | str) -> None:
            drawn.update(task, completed=done, total=total, numbers=describe(numbers))

        yield report


def describe(numbers: dict[str, float | str]) -> str:
    """`{"kl": 0.123456, "tok_per_s": 15321.2}` as `kl 0.1235  tok/s 15,321`."""
    return "  ".join(f"{name.replace('_per_', '/')} {short(v)}" for name, v in numbers.items())


def short(value: float | str) -> str:
    """A number in about five characters; text as it stands."""
    if isinstance(value, str):
        return value
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


class _Count(ProgressColumn):
    """`12,345/100,000 tokens 1,530/s`."""

    def __init__(self, unit: str):
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        total = "?" if task.total is None else short(task.total)
        rate = f" {short(float(round(task.speed)))}/s" if task.speed and task.speed >= 1 else ""
        return Text(f"{short(task.completed)}/{total} {self.unit}{rate}")


class _Lines:
    """Plain lines at most every `SECONDS_BETWEEN_LINES`, and one when the work is done."""

    def __init__(self, title: str, unit: str):
        self.title, self.unit = title, unit
        self.started = self.printed = time.monotonic()
        self.first: tuple[float, float] | None = None
        self.finished = False

    def __call__(self, done: float, total: float | None, **numbers: float | str) -> None:
        now = time.monotonic()
        self.first = self.first or (now, done)
        complete = total is not None and done >= total
        if self.finished or not (complete or now - self.printed >= SECONDS_BETWEEN_LINES):
            return
        self.finished, self.printed = complete, now
        line = f"{self.title}: {short(done)}/{short(total) if total else '?'} {self.unit}"
        line += f"{self._left(now, done, total)}  {describe(numbers)}"
        print(line, file=sys.stderr, flush=True)

    def _left(self, now: float, done: float, total: float | None) -> str:
        passed = now - self.started
        # What came before the first report (loading, compiling) says nothing about the rate.
        began, done_before = self.first or (now, done)
        gained = done - done_before
        if total is None or done >= total or gained <= 0:
            return f"  {passed:.0f} s"
        return f"  {passed:.0f} s, about {(now - began) * (total - done) / gained:.0f} s left"
