"""What came out of the recommender demo: a table of arms with paired differences, and a picture.

One idea: everything follows from `results.json`, so a page of an interrupted demo is as good as its
results.
"""

import math
import statistics
from pathlib import Path
from typing import Any


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard error over seeds; the error of one seed is not a number."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def paired(values: list[float], others: list[float]) -> tuple[float, float]:
    """Mean and standard error of the differences, seed by seed."""
    return spread([a - b for a, b in zip(values, others)])


def in_words(found: tuple[float, float], sign: str = "") -> str:
    """`0.1234 ± 0.0012`; the mean alone where one seed has no error."""
    mean = f"{found[0]:{sign}.4f}"
    return mean if math.isnan(found[1]) else f"{mean} ± {found[1]:.4f}"


def rows_of(arms: dict[str, dict[str, list[float]]]) -> list[list[str]]:
    """One line per arm: seeds, HR@10, NDCG@10, and NDCG@10 minus `none`."""
    none = arms.get("none", {}).get("ndcg10", [])
    return [
        [
            name,
            str(len(found["ndcg10"])),
            in_words(spread(found["hr10"])),
            in_words(spread(found["ndcg10"])),
            "" if name == "none" else in_words(paired(found["ndcg10"], none), "+"),
        ]
        for name, found in arms.items()
    ]


COLUMNS = ["arm", "seeds", "HR@10", "NDCG@10", "NDCG@10 minus none"]


def findings(results: dict[str, Any]) -> str:
    """The tables as Markdown."""
    teacher, popular = results["teacher"], results["popular"]
    parts = [
        f"Teacher alone on the test rows: HR@10 {teacher['hr10']:.4f}, "
        f"NDCG@10 {teacher['ndcg10']:.4f}; the most popular items: "
        f"HR@10 {popular['hr10']:.4f}, NDCG@10 {popular['ndcg10']:.4f}.",
        _table(rows_of(results["arms"])),
    ]
    if made := results.get("synthetic"):
        lists = made["lists"]["teacher"]
        parts += [
            "Made-up data; the item that came is in the teacher's list in "
            f"{lists['hr10']:.3f} of the training rows, in a perfect teacher's in "
            f"{made['lists']['perfect']['hr10']:.3f}.",
            _table(rows_of(made["arms"])),
        ]
    return "\n\n".join(parts) + "\n"


def _table(rows: list[list[str]]) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(results: dict[str, Any], target: Path) -> Path:
    """A PNG: NDCG@10 minus `none` of every arm, with its standard error."""
    from matplotlib.figure import Figure

    panels = {"MovieLens small": results["arms"]}
    if made := results.get("synthetic"):
        panels["made-up data"] = made["arms"]
    figure = Figure(figsize=(6 * len(panels), 4.5), layout="constrained")
    for axis, (title, arms) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items()
    ):
        names = [name for name in arms if name != "none"]
        found = [paired(arms[name]["ndcg10"], arms["none"]["ndcg10"]) for name in names]
        axis.barh(names, [mean for mean, _ in found], xerr=[error for _, error in found])
        axis.axvline(0, color="black", linewidth=0.8)
        axis.invert_yaxis()
        axis.locator_params(axis="x", nbins=5)
        axis.set(title=title, xlabel="NDCG@10 minus none, paired by seed")
    figure.savefig(target, dpi=120)
    return target
