"""One line about work that is under way: what it says, and what it leaves out where it is narrow.

One idea: a line is text made of parts with a fixed order of importance: title, count and time left
stay, the caller's own numbers go first, then the rate, then the bar. Speed is that of the last
minute or the last few reports, whichever reaches further back, and is not told before it means
something. Nothing is printed here.
"""

import unicodedata
from collections import deque
from itertools import accumulate

SECONDS_BEFORE_A_RATE = 3.0
"""What comes in the first moments is start-up and buffers."""
SECONDS_LOOKED_BACK, REPORTS_LOOKED_BACK = 60.0, 4
SECONDS_OF_A_BURST = 0.5
"""Reports so close together are one: a batch that is done is often told item by item."""
SHARE_BEFORE_A_RATE = 0.01
"""Of the work, or so many reports as are looked back: one answer of many that are written side by
side comes early, and the others follow all at once."""
SHORTEST_BAR, LONGEST_BAR = 8, 40
SHORTEST_TITLE = 12


class Pace:
    """How fast work goes, by the clock of whoever reports.

    What was done before the first report (loading, compiling, an earlier run) says nothing about
    the rate.
    """

    def __init__(self, now: float):
        self.began = now
        self.done, self.total = 0.0, None
        self._seen: deque[tuple[float, float]] = deque()

    def note(self, now: float, done: float, total: float | None) -> None:
        """A report: work done, and all of it where that is known."""
        self.done, self.total = done, total
        if self._seen and done <= self._seen[-1][1]:
            if len(self._seen) == 1:  # still at the start: loading is no part of the rate
                self._seen[0] = now, done
            return
        if len(self._seen) > 1 and now - self._seen[-1][0] < SECONDS_OF_A_BURST:
            now, _ = self._seen.pop()
        self._seen.append((now, done))
        while len(self._seen) > REPORTS_LOOKED_BACK:
            if now - self._seen[1][0] < SECONDS_LOOKED_BACK:
                break
            self._seen.popleft()

    @property
    def complete(self) -> bool:
        """Whether all the work is done."""
        return self.total is not None and self.done >= self.total

    def rate(self) -> float | None:
        """Work per second; None while nobody can tell."""
        if len(self._seen) < 2:
            return None
        (first, before), (last, after) = self._seen[0], self._seen[-1]
        done = after - before
        few = done < SHARE_BEFORE_A_RATE * (self.total or 0.0)
        # The first of a few that are answered together says as little as the first of many.
        few = few or (done <= 1 and len(self._seen) == 2)
        if last - first < SECONDS_BEFORE_A_RATE or (few and len(self._seen) < REPORTS_LOOKED_BACK):
            return None
        return done / (last - first)

    def left(self, now: float) -> float | None:
        """Seconds of work left, counting down between two reports; None while nobody can tell."""
        rate = self.rate()
        if rate is None or self.total is None or self.complete:
            return None
        return max(0.0, (self.total - self.done) / rate - (now - self._seen[-1][0]))


def line(title: str, unit: str, pace: Pace, numbers: str, now: float, width: int) -> str:
    """The line of a live bar in exactly so many columns or fewer."""
    times = _times(pace, now)
    count, rate = counted(pace, unit), _rate(pace)
    title = _cut(title, SHORTEST_TITLE) if _cells(title) > width // 3 else title
    kept = [part for part in (title, count, rate, times) if part]
    if _width(kept) > width:
        kept = [part for part in (title, count, times) if part]
    if _width(kept) > width:
        kept = [part for part in (counted(pace, ""), times) if part]
    words = numbers.split("  ") if numbers else []
    room = SHORTEST_BAR + 1 if pace.total else 0
    while words and _width([*kept, "  ".join(words)]) + room > width:
        words.pop()
    made = [*kept, *(["  ".join(words)] if words else [])]
    bar = min(width - _width(made) - 1, LONGEST_BAR)
    if pace.total and bar >= SHORTEST_BAR:
        made.insert(kept.index(title) + 1 if title in kept else 0, _bar(pace, bar))
    return _cut(" ".join(made), width).rstrip()


def log_line(title: str, unit: str, pace: Pace, numbers: str, now: float) -> str:
    """The same for a file: no bar, everything in words."""
    left = pace.left(now)
    passed = f"{now - pace.began:.0f} s"
    more = f", about {left:.0f} s left" if left is not None else ""
    return f"{title}: {counted(pace, unit)}  {passed}{more}  {numbers}".rstrip()


def counted(pace: Pace, unit: str) -> str:
    """`1,024/100,000 tokens`; without the total where it is not known."""
    of = f"/{short(pace.total)}" if pace.total is not None else ""
    return f"{short(pace.done)}{of} {unit}".rstrip()


def short(value: float | str) -> str:
    """A number in about five characters; text as it stands."""
    if isinstance(value, str):
        return value
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def clock(seconds: float) -> str:
    """`0:42`, `12:05`, `3:07:40`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _times(pace: Pace, now: float) -> str:
    """Time left; until that is known, or where nothing is left, time passed."""
    left = pace.left(now)
    return clock(now - pace.began) if left is None else f"{clock(left)} left"


def _rate(pace: Pace) -> str:
    rate = pace.rate()
    if rate is None or pace.complete:
        return ""
    if rate >= 1:
        return f"{short(float(round(rate)))}/s"
    return f"{1 / rate:.1f} s each" if rate > 0 else ""


def _bar(pace: Pace, width: int) -> str:
    full = round(width * min(1.0, pace.done / pace.total)) if pace.total else 0
    return "━" * full + "╌" * (width - full)


def _width(parts: list[str]) -> int:
    return sum(map(_cells, parts)) + len(parts) - 1


def _cells(text: str) -> int:
    """Columns that a text takes."""
    return sum(map(_columns, text))


def _cut(text: str, width: int) -> str:
    """As much of a text as so many columns hold."""
    ends = accumulate(map(_columns, text))
    return "".join(character for character, end in zip(text, ends) if end <= width)


def _columns(character: str) -> int:
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
