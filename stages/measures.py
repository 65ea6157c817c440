"""What `stillroom evaluate --tasks`, `--rouge-l` and `generate --side-by-side` show.

One idea: each is one table of teacher, student and whatever stands beside them, and the same as
JSON in the run's directory. Answers are strangers' text; `console` makes them safe.
"""

import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from stillroom.stages.console import document, on_terminal, put, say, table

if TYPE_CHECKING:
    from stillroom.pipeline.config import Run

LINE = 96
"""Columns of an answer in a file or pipe, beside its indent."""


def tasks(run: "Run", names: str, shots: int, limit: int, chat: bool, as_json: bool) -> None:
    """Ask the tasks of lm-evaluation-harness."""
    from stillroom.pipeline import provenance
    from stillroom.pipeline.evaluation.tasks import RESULT, Asked, measure_tasks

    wanted = tuple(name.strip() for name in names.split(",") if name.strip())
    asked = Asked(wanted, None if shots < 0 else shots, limit, chat)
    found = measure_tasks(run, asked, lambda label: say(f"asking {label}"))
    provenance.record(run.path("run.json"), "evaluate --tasks")
    if as_json:
        document({label: [asdict(one) for one in own] for label, own in found.items()})
        return
    cells = {
        label: {(one.task, one.measure): _with_error(one.value, one.standard_error) for one in own}
        for label, own in found.items()
    }
    lines = list(dict.fromkeys(key for own in cells.values() for key in own))
    rows = [[*line, *(own.get(line, "") for own in cells.values())] for line in lines]
    table(f"tasks, {run.name}", ["task", "measure", *cells], rows)
    put(run.path(RESULT))


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def rouge_l(run: "Run", as_json: bool) -> None:
    """Judge five answers of each model to every held-out instruction."""
    from stillroom.pipeline import provenance
    from stillroom.pipeline.evaluation.answers import RESULT, measure_rouge

    found = measure_rouge(run, on_model=lambda label: say(f"asking {label}"))
    provenance.record(run.path("run.json"), "evaluate --rouge-l")
    if as_json:
        document({label: asdict(one) for label, one in found.items()})
        return
    rows = [
        [label, f"{one.mean:.2f} ± {one.standard_error:.2f}", *(f"{v:.2f}" for v in one.draws)]
        for label, one in found.items()
    ]
    numbers = [f"draw {number}" for number in range(1, 1 + len(next(iter(found.values())).draws))]
    table(f"Rouge-L on held-out instructions, {run.name}", ["model", "mean", *numbers], rows)
    put(run.path(RESULT))


def show_answers(run_file: Path, count: int) -> None:
    """Answers of the data, the teacher and the students to held-out instructions."""
    from stillroom.pipeline import config

    run = config.load(run_file)
    from stillroom.pipeline.evaluation.answers import side_by_side

    found = side_by_side(run, count, lambda label: say(f"asking {label}"))
    for number, (prompt, right, said) in enumerate(found, 1):
        put(f"{number} of {len(found)}: {prompt}")
        answers = {"the data": right} | said
        if on_terminal():
            table("", ["", *answers], [["", *answers.values()]])
        else:
            _put_below(answers)


def _put_below(answers: dict[str, str]) -> None:
    """Answers under each other, in lines that a page holds."""
    for label, answer in answers.items():
        put(f"  {label}:")
        for line in textwrap.wrap(answer, LINE) or [""]:
            put(f"    {line}")
