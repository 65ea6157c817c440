"""Tables and plots of `benchmarks.students`: means and standard errors over the seeds run.

One idea: reads the cells' files and nothing else, so a report is of what is there. Arms are
compared seed by seed (a seed is an order of the text, the same for every arm), so the difference of
two arms has a smaller error than either. It runs nothing.
"""

import json
from pathlib import Path
from typing import Any

from stillroom.cache_schemas.errors import ConfigError
from stillroom.stages.demos.vision_findings import spread

CEILING = "full"
"""The arm that others are compared with: the teacher's whole distribution."""

COLUMNS = {
    "kl": ("KL", ".3f"),
    "relative_to_full": ("KL to full", "+.1%"),
    "reverse_kl": ("reverse KL", ".3f"),
    "before_kl": ("KL before", ".3f"),
    "before_reverse_kl": ("reverse KL before", ".3f"),
    "top1": ("top-1", ".3f"),
    "perplexity": ("perplexity", ".0f"),
}
"""What a cell may measure: its column's head, and the form of its numbers."""


def report(cells: Path, grid: str) -> dict[str, Any]:
    """Means and standard errors over the seeds that were run; a table and a plot beside the cells.

    Args:
        cells: directory that holds `<grid>/<arm>-<steps>-<seed>.json`.
        grid: its name.

    Returns:
        `rows`, one per arm and number of steps; `cells`, how many were found. In a row
        `relative_to_full` is the mean over the seeds that both arms have of KL / KL(full) - 1.

    Raises:
        ConfigError: nothing has been run.
    """
    found = [json.loads(path.read_text()) for path in sorted((cells / grid).glob("*.json"))]
    if not found:
        remedy = f"Run `python -m benchmarks.students --grid {grid}` first."
        raise ConfigError("no cell has been run", where=str(cells / grid), remedy=remedy)
    groups: dict[tuple, list[dict]] = {}
    for cell in found:
        groups.setdefault((cell["steps"], cell["arm"]), []).append(cell)
    rows = [_row(own, groups.get((steps, CEILING), [])) for (steps, _), own in groups.items()]
    rows.sort(key=lambda row: (row["steps"], row["kl"]))
    (cells / f"{grid}.md").write_text(table(rows))
    if grid == "tail" and rows:
        _plot(rows, cells / f"{grid}.png")
    return {"rows": rows, "cells": len(found)}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    shown = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    head = ["arm", "tokens", "seeds", "bytes/token", *(COLUMNS[key][0] for key in shown)]
    lines = [head, ["---"] * len(head), *(_cells(row, shown) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(row: dict[str, Any], shown: list[str]) -> list[str]:
    return [
        f"`{row['arm']}`",
        f"{row['tokens']:,}",
        str(row["seeds"]),
        # The ceiling lives on hidden states, which these bytes leave out.
        "-" if row["arm"] == CEILING else f"{row['bytes_per_token']:.1f}",
        *(_with_error(row, key, COLUMNS[key][1]) for key in shown),
    ]


def _with_error(row: dict[str, Any], key: str, form: str) -> str:
    if row.get(key) is None:
        return "-"
    error = row[f"{key}_standard_error"]
    tail = "" if error is None else f" ± {error:{form.lstrip('+')}}"
    return f"{row[key]:{form}}{tail}"


def _row(cells: list[dict], ceiling: list[dict]) -> dict[str, Any]:
    kept = ("arm", "steps", "tokens", "k", "draws", "bytes_per_token")
    full = {cell["seed"]: cell["kl"] for cell in ceiling}
    shares = [cell["kl"] / full[cell["seed"]] - 1 for cell in cells if cell["seed"] in full]
    return {
        **{key: cells[0][key] for key in kept},
        "seeds": len(cells),
        **_mean_and_error(shares, "relative_to_full"),
        **{
            name: value
            for key in COLUMNS
            if all(key in cell for cell in cells)
            for name, value in _mean_and_error([cell[key] for cell in cells], key).items()
        },
    }


def _mean_and_error(values: list[float], key: str) -> dict[str, float | None]:
    found = spread(values) if values else {"mean": None, "error": None}
    return {key: found["mean"], f"{key}_standard_error": found["error"]}


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    lengths = sorted({row["steps"] for row in rows})
    figure = Figure(figsize=(6 * len(lengths), 4.5), layout="constrained")
    for axis, steps in zip(
        figure.subplots(1, len(lengths), squeeze=False)[0], lengths, strict=True
    ):
        own = [row for row in rows if row["steps"] == steps]
        _draw(axis, own)
        seeds = max(row["seeds"] for row in own)
        axis.set(title=f"{own[0]['tokens']:,} tokens per run, up to {seeds} seeds")
    figure.savefig(path, dpi=110)


def _draw(axis: Any, rows: list[dict[str, Any]]) -> None:
    """One curve per treatment; 0 is what the full vocabulary gives."""
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    compared = [r for r in rows if r["arm"] != CEILING and r["relative_to_full"] is not None]
    for treatment in sorted({row["arm"].split("-")[0] for row in compared}):
        own = [row for row in compared if row["arm"].split("-")[0] == treatment]
        own.sort(key=lambda row: row["bytes_per_token"])
        axis.errorbar(
            [row["bytes_per_token"] for row in own],
            [100 * row["relative_to_full"] for row in own],
            yerr=[100 * (row["relative_to_full_standard_error"] or 0.0) for row in own],
            marker="o",
            capsize=3,
            label=treatment,
        )
    axis.axhline(0.0, linestyle="--", color="grey")
    axis.set(xscale="log", xlabel="bytes per token, as stored")
    axis.set_ylabel("held-out KL above full vocabulary, %")
    axis.set_xticks([20, 40, 100, 180])
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_formatter(NullFormatter())
    if compared:
        axis.legend()
