"""What `cache plan` leaves behind: the run file with the chosen settings, and a picture.

One idea: a run file belongs to its author, so only the keys that were chosen change and every other
line, comments included, stays as it is. Nothing is decided here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stillroom.cache_schemas.errors import ConfigError
from stillroom.pipeline import config
from stillroom.pipeline.planning.frontier import Point


def write_run(source: str | Path, target: str | Path, keys: Mapping[str, Any]) -> None:
    """Copy a run file with `keys` in its [capture] table.

    Raises:
        ConfigError: the source is no run file.
    """
    run = config.load(source)
    text = _with_keys(Path(source).read_text(encoding="utf-8"), keys)
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    Path(target).write_text(text, encoding="utf-8")
    written = config.load(target)
    assert written.capture is not None
    expected = (run.capture or config.Capture()).model_copy(update=dict(keys))
    if written.capture != expected:  # as in a table that is written inline
        Path(target).unlink()
        raise ConfigError(
            "its [capture] table is not written key by key",
            where=str(source),
            remedy="Set by hand: " + ", ".join(_line(*item) for item in keys.items()) + ".",
        )


def plot(points: Sequence[Point], chosen: Point, path: str | Path) -> None:
    """PNG: gradient error against bytes a token, one colour per way to keep the tail."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours = iter(f"C{number}" for number in range(10))
    for tail in sorted({point.setting.tail for point in points}):
        own = [point for point in points if point.setting.tail == tail]
        colour = next(colours)
        for profile, marker in (("small", "o"), ("strict", "s"), ("exact", "^")):
            drawn = [point for point in own if point.setting.profile == profile]
            if drawn:
                x = [point.bytes_per_token for point in drawn]
                y = [point.gradient_error for point in drawn]
                looks = {"marker": marker, "color": colour, "s": 22}
                axes.scatter(x, y, label=f"{tail}, {profile}", **looks)
    best = [point for point in points if point.efficient]
    axes.plot([p.bytes_per_token for p in best], [p.gradient_error for p in best], "k-", lw=0.8)
    for point in best:
        where = point.bytes_per_token, point.gradient_error
        axes.annotate(f"k={point.setting.k}", where, fontsize=7, xytext=(3, 3), **_OFFSET)
    spot = chosen.bytes_per_token, chosen.gradient_error
    axes.plot(*spot, "r*", ms=15, label="chosen")
    axes.set(xscale="log", yscale="log", xlabel="bytes per token", ylabel="gradient error")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize=7, ncols=2)
    axes.grid(alpha=0.3)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})


_OFFSET: dict[str, Any] = {"textcoords": "offset points"}


def _with_keys(text: str, keys: Mapping[str, Any]) -> str:
    """TOML text whose [capture] table has `keys` first and none of their old lines."""
    lines, inside, found = [], False, False
    for line in text.splitlines():
        if line.lstrip().startswith("["):
            inside = line.split("#")[0].strip() == "[capture]"
        name = line.split("=")[0].strip()
        if inside and name in keys:
            continue
        lines.append(line)
        if inside and line.lstrip().startswith("["):
            lines += [_line(*item) for item in keys.items()]
            found = True
    if not found:
        lines += ["", "[capture]", *(_line(*item) for item in keys.items())]
    return "\n".join(lines) + "\n"


def _line(name: str, value: Any) -> str:
    return f'{name} = "{value}"' if isinstance(value, str) else f"{name} = {value!r}"
