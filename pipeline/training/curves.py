"""A PNG of training curves.

One idea: it is drawn from `metrics.jsonl` alone, so any number of finished runs can be compared.
"""

from collections.abc import Mapping
from pathlib import Path

from stillroom.pipeline.training.metrics import read_metrics


def draw_curves(runs: Mapping[str, Path], target: Path) -> Path:
    """Draw each objective of several runs over the steps.

    Args:
        runs: label -> run directory.
        target: PNG to write.
    """
    from matplotlib.figure import Figure

    logged = {label: read_metrics(directory) for label, directory in runs.items()}
    shown = [label for label, lines in logged.items() if lines]
    names = sorted({n for lines in logged.values() for line in lines for n in line if "/" in n})
    panels = ["loss", *names]
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for label in shown:
            points = [(line["step"], line[name]) for line in logged[label] if name in line]
            if points:
                axis.plot(*zip(*points), label=label)
        unit = "" if name.startswith("validation/") else "nats per token"
        axis.set(title=name.removeprefix("objective/"), xlabel="step", ylabel=unit)
        axis.legend()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    return target
