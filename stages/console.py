"""How every stage talks: progress on stderr, results on stdout, one style.

One idea: this is the only place that writes to a terminal, and all text on its way passes `shown`:
credentials are hidden and whatever could act on a terminal is escaped, so a caller need not ask
whose text it prints. On a terminal a live bar, otherwise a plain line now and then, so that a log
file of a ten-hour job stays readable. The pipeline reports numbers through a callback and never
draws.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.table import Table
from rich.text import Text

from stillroom.cache_schemas.scrubbing import scrub, scrubbed
from stillroom.pipeline.plain_text import plain, plain_json
from stillroom.stages.progress_line import Pace, line, log_line, short

SECONDS_BETWEEN_LINES = 10.0
QUIET = "STILLROOM_QUIET"
"""Set in the environment by `--quiet`, so that the stages of a whole run are quiet too."""
WIDE = 100_000
"""Columns of a file or pipe: nothing is wrapped there, unless COLUMNS asks for it."""

LONGEST_WORD = 24
"""Columns of a word that no table cuts, however narrow: half a figure is another figure."""

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


def is_quiet() -> bool:
    """Whether only results, warnings and errors are wanted."""
    return bool(os.environ.get(QUIET))


def say(message: str) -> None:
    """One line for a person; stderr, so that stdout holds results only."""
    if not is_quiet():
        warn(message)


def warn(message: str) -> None:
    """The same for what must be told: warnings and errors, with `--quiet` too."""
    err.print(Text(shown(message)), soft_wrap=True)


def put(line: object) -> None:
    """One result, such as a path: a line on stdout, never wrapped or styled."""
    print(shown(str(line)), flush=True)


def document(value: Any) -> None:
    """A JSON value on stdout."""
    print(plain_json(json.dumps(scrubbed(value), indent=2, ensure_ascii=False)), flush=True)


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A small result table on stdout; numbers are right-aligned. Its title and its first column,
    where names and paths are, are never wrapped; nothing is where stdout is no terminal and COLUMNS
    is not set."""
    cells = [[Text(_line(cell)) for cell in row] for row in rows]
    made = Table()
    for index, column in enumerate(columns):
        widest = max([cell_len(row[index].plain) for row in cells], default=0)
        words = [*column.split(), *(word for row in cells for word in row[index].plain.split())]
        longest = min(LONGEST_WORD, max(map(cell_len, words), default=0))
        first, head = index == 0, Text(_line(column))
        least, side = (widest, "left") if first else (longest, "right")
        made.add_column(head, justify=side, min_width=least, no_wrap=first)
    for row in cells:
        made.add_row(*row)
    put(_line(title))
    asked = os.environ.get("COLUMNS", "")
    width = int(asked) if asked.isdecimal() and int(asked) else WIDE
    drawn = out if out.is_terminal else Console(width=width)
    drawn.print(made, crop=False)


def coloured(pieces: Iterable[tuple[str, str]]) -> None:
    """Text in pieces, each with its rich style, on stdout."""
    made = Text()
    for text, style in pieces:
        made.append(shown(text), style)
    out.print(made, soft_wrap=True)


def on_terminal() -> bool:
    """Whether a person sees stdout as it comes: styles, and tables of its width."""
    return out.is_terminal


def show_traceback(error: BaseException) -> None:
    """Where an error came from; stderr."""
    warn("".join(traceback.format_exception(error)).rstrip("\n"))


def _line(text: str) -> str:
    """Text that may not end its line."""
    return plain(scrub(text))


@contextmanager
def progress(title: str, unit: str = "tokens") -> Iterator[Report]:
    """Show one piece of work: bar, count, rate, time left and the caller's own numbers."""
    if is_quiet():
        yield lambda done, total, **numbers: None
    elif not err.is_terminal:
        yield _Lines(title, unit)
    else:
        bar = _Bar(title, unit)
        with Live(bar, console=err, refresh_per_second=4):
            yield bar


def describe(numbers: dict[str, float | str]) -> str:
    """`{"kl": 0.123456, "tok_per_s": 15321.2}` as `kl 0.1235  tok/s 15,321`; what is 0 or empty so
    far is not told."""
    told = {name: value for name, value in numbers.items() if value}
    return "  ".join(f"{name.replace('_per_', '/')} {short(v)}" for name, v in told.items())


class _Bar:
    """A live line; drawn again several times a second, so that the time left counts down."""

    def __init__(self, title: str, unit: str):
        self.title, self.unit, self.numbers = _line(title), unit, ""
        self.pace = Pace(time.monotonic())

    def __call__(self, done: float, total: float | None, **numbers: float | str) -> None:
        self.pace.note(time.monotonic(), done, total)
        self.numbers = _line(describe(numbers))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        about = self.title, self.unit, self.pace, self.numbers
        drawn = line(*about, time.monotonic(), options.max_width)
        if not options.encoding.startswith("utf"):
            drawn = drawn.replace("━", "#").replace("╌", "-")
        yield Text(drawn, no_wrap=True, overflow="crop")


class _Lines:
    """Plain lines at most every `SECONDS_BETWEEN_LINES`, and one when the work is done."""

    def __init__(self, title: str, unit: str):
        self.title, self.unit = title, unit
        self.pace = Pace(time.monotonic())
        self.printed = self.pace.began
        self.finished = False

    def __call__(self, done: float, total: float | None, **numbers: float | str) -> None:
        now = time.monotonic()
        self.pace.note(now, done, total)
        complete = self.pace.complete
        if self.finished or not (complete or now - self.printed >= SECONDS_BETWEEN_LINES):
            return
        self.finished, self.printed = complete, now
        told = log_line(self.title, self.unit, self.pace, describe(numbers), now)
        print(_line(told), file=sys.stderr, flush=True)
