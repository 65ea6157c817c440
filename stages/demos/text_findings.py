"""The text demo's numbers: `results.json`, and the tables that a person sees.

One idea: student and control are measured on the same windows, so each figure comes with its
standard error over windows, and their difference with that of the differences, where most of what
makes a window hard cancels. One run is one seed, and that is said; nothing is run here.
"""

import json
from pathlib import Path
from typing import Any

from stillroom.stages.console import put, say, table

ROWS = {
    "teacher": "teacher",
    "before": "student before training",
    "after": "student, distilled",
    "control": "control, text only",
}
NAMES = {"teacher": "teacher", "before": "before", "after": "student", "control": "control"}
"""Models of an evaluation, as the table and as keys of perplexities name them."""
MEASURES = {"kl": "kl", "top1": "top1", "perplexity": "ppl"}
DIFFERENCES = {"kl": "kl", "hits": "top1", "nll": "log_perplexity"}
SPREAD = "standard errors over {} windows; differences are paired by window; one seed"


def figures(evaluation: Path) -> dict[str, Any]:
    """What `stillroom evaluate` left, under the demo's names: means, `spread` and
    `student_minus_control`."""
    from stillroom.pipeline.evaluation.scores import mean_and_error

    facts = json.loads(evaluation.read_text())
    models, found = facts["models"], {}
    spread: dict[str, Any] = {"of": SPREAD.format(facts["examples"])}
    for model, name in NAMES.items():
        for measure, key in MEASURES.items():
            if model != "teacher" or measure == "perplexity":
                label = f"{key}_{name if measure == 'perplexity' else model}"
                found[label] = models[model][measure]
                spread[label] = models[model][f"{measure}_standard_error"]
    student, control = (models[name]["by_example"] for name in ("after", "control"))
    difference = {}
    for sums, name in DIFFERENCES.items():
        gaps = [a - b for a, b in zip(student[sums], control[sums], strict=True)]
        mean, error = mean_and_error(gaps, student["rows"])
        difference[name] = {"mean": mean, "error": error}
    return found | {"spread": spread, "student_minus_control": difference}


def show(results: dict[str, Any], directory: Path) -> None:
    """The results as tables, answers, and where the rest is."""
    _figures(f"held-out text of the same kind ({results['spread']['of']})", results)
    if elsewhere := results.get("elsewhere"):
        _figures(
            f"text of another kind that neither has seen ({elsewhere['spread']['of']})", elsewhere
        )
    if answers := results.get("answers"):
        _answers(answers)
    seconds = {name: "-" if s is None else f"{s:,.0f}" for name, s in results["seconds"].items()}
    table("seconds", list(seconds), [list(seconds.values())])
    tokens, size = results["tokens_captured"], results["bytes_per_token"]
    say(f"cache: {tokens:,} tokens, {size:.1f} bytes per token, everything on disk counted")
    put(f"{directory}/results.json  {directory}/curves.png")


def _figures(title: str, found: dict[str, Any]) -> None:
    rows = []
    for model, words in ROWS.items():
        kl, top1, perplexity = f"kl_{model}", f"top1_{model}", f"ppl_{NAMES[model]}"
        known = [("0", "1")] if model == "teacher" else []
        first = known[0] if known else (_with_error(found, kl, 3), _with_error(found, top1, 3))
        rows.append([words, *first, _with_error(found, perplexity, 1)])
    table(title, ["model", "KL to teacher, nats", "same top-1", "perplexity"], rows)
    put(in_words(found["student_minus_control"]))


def _with_error(found: dict[str, Any], key: str, digits: int) -> str:
    return f"{found[key]:,.{digits}f} ± {found['spread'][key]:,.{digits}f}"


def in_words(difference: dict[str, dict[str, float]]) -> str:
    """The student less the control, and which of them is ahead in what."""
    shown = [
        f"{name.replace('_', ' ')} {gap['mean']:+.3f} ± {gap['error']:.3f} ({_ahead(name, gap)})"
        for name, gap in difference.items()
    ]
    return "student less control: " + ", ".join(shown)


def _ahead(name: str, gap: dict[str, float]) -> str:
    """Who is ahead, if it is by more than two errors."""
    if abs(gap["mean"]) <= 2 * gap["error"]:
        return "level"
    better = gap["mean"] > 0 if name == "top1" else gap["mean"] < 0
    return "student ahead" if better else "control ahead"


def _answers(answers: dict[str, Any]) -> None:
    from stillroom.stages.ask import in_lines

    shown = {label: said for label, said in answers["answers"].items() if label != "before"}
    for line in in_lines(answers | {"answers": shown}):
        put(line)
