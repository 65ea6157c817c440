"""How every stage talks: progress on stderr, results on stdout, one style.

One idea: this is the only place that writes to a terminal, and all text on its way passes `shown`:
credentials are hidden and whatever could act on a terminal is escaped, so a caller need not ask
whose text it prints. On a terminal a live bar, otherwise a plain line now and then, so that a log
file of a ten-hour job stays readable. The pipeline reports numbers through a callback and never
draws.
"""

import json
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from stillroom.cache_schemas.scrubbing import scrub, scrubbed
from stillroom.pipeline.plain_text import plain, plain_json

SECONDS_BETWEEN_LINES = 15.0
WIDE = 100_000
"""Columns of a file or pipe: nothing is wrapped there."""

# Text is never markup: `[/b]` in a stranger's text is four characters.
out = Console(markup=False, highlight=False, emoji=False)
err = Console(markup=False, highlight=False, emoji=False, stderr=True)


def shown(text: str) -> str:
    """A text as a person may see it; line ends and tabs stay."""
    return "\n".join(
        "\t".join(plain(cell) for cell in line.split("\t")) for line in scrub(text).split("\n")
    )


class Report(Protocol):
    """What a stage calls with its newest numbers."""

    def __call__(self, done: float, total: float | None, **numbers: float | str) -> None:
        """Work done, all the work where it is known (in the bar's unit), and further numbers."""
        ...


def say(message: str) -> None:
    """One line for a person; stderr, so that stdout holds results only."""
    err.print(Text(shown(message)), soft_wrap=True)


def put(line: object) -> None:
    """One result, such as a path: a line on stdout, never wrapped or styled."""
    print(shown(str(line)), flush=True)


def document(value: Any) -> None:
    """A JSON value on stdout."""
    print(plain_json(json.dumps(scrubbed(value), indent=2, ensure_ascii=False)), flush=True)


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A small result table on stdout; numbers are right-aligned. Its title and its first column,
    where names and paths are, are never wrapped; nothing is where stdout is no terminal."""
    cells = [[Text(_line(cell)) for cell in row] for row in rows]
    made = Table()
    for index, column in enumerate(columns):
        widest = max([cell_len(row[index].plain) for row in cells], default=0)
        least = {"min_width": widest, "no_wrap": True} if index == 0 else {}
        made.add_column(Text(_line(column)), justify="left" if index == 0 else "right", **least)
    for row in cells:
        made.add_row(*row)
    put(_line(title))
    drawn = out if out.is_terminal else Console(width=WIDE)
    drawn.print(made, crop=False)


def coloured(pieces: Iterable[tuple[str, str]]) -> None:
    """Text in pieces, each with its rich style, on stdout."""
    made = Text()
    for text, style in pieces:
        made.append(shown(text), style)
    out.print(made, soft_wrap=True)


def has_colours() -> bool:
    """Whether styles can be seen on stdout."""
    return out.is_terminal


def show_traceback(error: BaseException) -> None:
    """Where an error came from; stderr."""
    say("".join(traceback.format_exception(error)).rstrip("\n"))


def _line(text: str) -> str:
    """Text that may not end its line."""
    return plain(scrub(text))


@contextmanager
def progress(title: str, unit: str = "tokens") -> Iterator[Report]:
    """Show one piece of work: bar, count, rate, time left and the caller's own numbers."""
    if not err.is_terminal:
        yield _Lines(title, unit)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        _Count(unit),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}", style="dim", markup=False),
    )
    with Progress(*columns, console=err) as drawn:
        task = drawn.add_task(_line(title), total=None, numbers="")

        def report(done: float, total: float | None, **numbers: float | str) -> None:
            drawn.update(task, completed=done, total=total, numbers=_line(describe(numbers)))

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
        print(_line(line), file=sys.stderr, flush=True)

    def _left(self, now: float, done: float, total: float | None) -> str:
        passed = now - self.started
        # What came before the first report (loading, compiling) says nothing about the rate.
        began, done_before = self.first or (now, done)
        gained = done - done_before
        if total is None or done >= total or gained <= 0:
            return f"  {passed:.0f} s"
        return f"  {passed:.0f} s, about {(now - began) * (total - done) / gained:.0f} s left"
