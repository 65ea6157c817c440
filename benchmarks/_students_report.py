"""Tables and plots of `benchmarks.students`: means and standard errors over the seeds run.

One idea: reads the cells' files and nothing else, so a report is of what is there. It runs nothing.
"""

import json
import statistics
from pathlib import Path
from typing import Any


def report(cells: Path, grid: str) -> dict[str, Any]:
    """Means and standard errors over the seeds that were run, and a plot beside them."""
    found = [json.loads(path.read_text()) for path in sorted((cells / grid).glob("*.json"))]
    groups: dict[tuple, list[dict]] = {}
    for cell in found:
        groups.setdefault((cell["steps"], cell["arm"]), []).append(cell)
    rows = [_row(own) for _, own in sorted(groups.items())]
    if grid == "tail" and rows:
        _plot(rows, cells / f"{grid}.png")
    return {"rows": rows, "cells": len(found)}


def _row(cells: list[dict]) -> dict[str, Any]:
    kept = ("arm", "steps", "tokens", "k", "draws", "bytes_per_token")
    return {
        **{key: cells[0][key] for key in kept},
        "seeds": len(cells),
        **_mean_and_error(cells, "kl"),
        **_mean_and_error(cells, "top1"),
        **_mean_and_error(cells, "perplexity"),
    }


def _mean_and_error(cells: list[dict], key: str) -> dict[str, float | None]:
    values = [cell[key] for cell in cells]
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {key: statistics.mean(values), f"{key}_standard_error": error}


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    lengths = sorted({row["steps"] for row in rows})
    figure = Figure(figsize=(6 * len(lengths), 4.5), layout="constrained")
    for axis, steps in zip(
        figure.subplots(1, len(lengths), squeeze=False)[0], lengths, strict=True
    ):
        own = [row for row in rows if row["steps"] == steps]
        _draw(axis, own)
        axis.set(title=f"{own[0]['tokens']:,} tokens per run")
    figure.savefig(path, dpi=110)


def _draw(axis: Any, rows: list[dict[str, Any]]) -> None:
    """One curve per treatment, and the full vocabulary as a line."""
    for treatment in sorted({row["arm"].split("-")[0] for row in rows}):
        own = [row for row in rows if row["arm"].split("-")[0] == treatment]
        own.sort(key=lambda row: row["bytes_per_token"])
        if treatment == "full":
            axis.axhline(own[0]["kl"], linestyle="--", color="grey", label="full vocabulary")
            continue
        axis.errorbar(
            [row["bytes_per_token"] for row in own],
            [row["kl"] for row in own],
            yerr=[row["kl_standard_error"] or 0.0 for row in own],
            marker="o",
            capsize=3,
            label=treatment,
        )
    axis.set(xscale="log", xlabel="bytes per token, as stored", ylabel="held-out KL (nats)")
    axis.legend()
