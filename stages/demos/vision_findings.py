"""The vision demo's results as Markdown tables: accuracy by arm, and probes by layer.

One idea: arms share seeds, so what an arm gains is the mean of differences within a seed, and its
standard error is that of these differences. It computes nothing but means and errors.
"""

import statistics
from typing import Any

BASELINE = "none"


def findings(results: dict[str, Any]) -> str:
    """Markdown of results.json."""
    blind = results["blind_accuracy"]
    head = (
        f"{results['test_questions']} questions about {results['test_pictures']} test pictures. "
        f"Teacher {results['teacher_accuracy']:.3f}; the most common answer to each question "
        f"{blind['question']:.3f}, the most common answer {blind['majority']:.3f}."
    )
    arms = results["arms"]
    targets = next(iter(next(iter(arms.values()))["seeds"].values()))["probes"]
    probes = [_probes(arms, target) for target in targets]
    return "\n\n".join([head, _accuracies(arms), *probes]) + "\n"


def spread(values: list[float]) -> dict[str, float | None]:
    """Mean and standard error; a single value has none."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "error": error}


def in_words(found: dict[str, float | None], sign: str = "") -> str:
    """`0.512 ± 0.003`, or the mean alone."""
    mean = f"{found['mean']:{sign}.3f}"
    return mean if found["error"] is None else f"{mean} ± {found['error']:.3f}"


def _accuracies(arms: dict[str, Any]) -> str:
    rows = []
    for arm, found in arms.items():
        own = {seed: one["accuracy"] for seed, one in found["seeds"].items()}
        gain = _gain(own, arms, lambda one: one["accuracy"])
        rows.append([f"`{arm}`", str(len(own)), _plain(list(own.values())), gain])
    return _table(["arm", "seeds", "accuracy", f"minus `{BASELINE}`"], rows)


def _probes(arms: dict[str, Any], target: str) -> str:
    rows: list[list[str]] = []
    layers: list[str] = []
    for arm, found in arms.items():
        by_seed = {seed: one["probes"][target] for seed, one in found["seeds"].items()}
        layers = list(next(iter(by_seed.values())))
        means = {seed: statistics.fmean(values.values()) for seed, values in by_seed.items()}
        gain = _gain(means, arms, lambda one: statistics.fmean(one["probes"][target].values()))
        cells = [_plain([values[layer] for values in by_seed.values()]) for layer in layers]
        rows.append([f"`{arm}`", *cells, gain])
    head = [f"probe of {target}", *(f"layer {n}" for n in layers), f"mean minus `{BASELINE}`"]
    return _table(head, rows)


def _gain(own: dict[str, float], arms: dict[str, Any], value: Any) -> str:
    """Differences to the baseline's students of the same seeds."""
    others = arms.get(BASELINE, {"seeds": {}})["seeds"]
    pairs = [mine - value(others[seed]) for seed, mine in own.items() if seed in others]
    return in_words(spread(pairs), "+") if pairs else ""


def _plain(values: list[float]) -> str:
    return in_words(spread(values))


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
