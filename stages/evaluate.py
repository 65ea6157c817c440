"""`stillroom evaluate`: students against the live teacher on held-out text."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from stillroom.stages.arguments import AsJson, RunFile
from stillroom.stages.console import document, progress, put, say, table, warn
from stillroom.stages.corpus import shares


def evaluate(
    run_file: RunFile,
    tasks: Annotated[
        str, typer.Option(help="Instead: tasks of lm-evaluation-harness, or YAML files; commas.")
    ] = "",
    shots: Annotated[
        int, typer.Option(min=-1, help="--tasks: solved examples in front; -1: the task's own.")
    ] = -1,
    limit: Annotated[int, typer.Option(min=0, help="--tasks: questions of each; 0: all.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="--tasks: in the chat template.")] = False,
    rouge_l: Annotated[
        bool, typer.Option("--rouge-l", help="Instead: five answers to held-out instructions.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Full-vocabulary KL to the teacher, top-1 agreement and perplexity of every student; for
    recommenders, hit rates and NDCG of student, teacher and the most popular items."""
    from stillroom.pipeline import config, provenance
    from stillroom.pipeline.evaluation.students import students_of

    run = config.load(run_file)
    _check_options(tasks, rouge_l, as_json, {"shots": shots >= 0, "limit": limit > 0, "chat": chat})
    students = {} if run.recommender is not None else students_of(run)
    from stillroom.pipeline.evaluation.held_out import EvaluateProgress
    from stillroom.pipeline.evaluation.held_out import evaluate as measure
    from stillroom.pipeline.evaluation.on_the_card import card_results
    from stillroom.pipeline.training.card import add_results, check_card
    from stillroom.pipeline.training.curves import draw_curves

    check_card(run)
    if tasks or rouge_l:
        from stillroom.stages import measures

        if tasks:
            measures.tasks(run, tasks, shots, limit, chat, as_json)
        if rouge_l:
            measures.rouge_l(run, as_json)
        return
    if run.recommender is not None:
        _recommender(run, run_file, as_json)
        return
    with progress("evaluate", "examples") as report:

        def show(now: EvaluateProgress) -> None:
            report(now.done, now.total, **{f"kl {k}": v for k, v in now.kl.items() if v})

        found = measure(run, show)
    provenance.record(run.path("run.json"), "evaluate")
    add_results(run, card_results(found))
    trained = {label: Path(path).parent for label, path in students.items()}
    trained.pop("before", None)
    if run.train is not None:  # whoever trains nothing has no curves of its own
        draw_curves(trained, run.path("curves.png"))
    if as_json:
        document({label: asdict(scores) for label, scores in found.items()})
        return
    rows = [
        [
            label,
            f"{scores.kl:.4f} ± {scores.kl_standard_error:.4f}",
            f"{scores.top1:.3f} ± {scores.top1_standard_error:.3f}",
            f"{scores.perplexity:,.1f} ± {scores.perplexity_standard_error:,.1f}",
            f"{scores.no_token:.2%}",
            f"{scores.parameters / 1e6:,.1f}",
        ]
        for label, scores in found.items()
    ]
    columns = ["model", "KL to teacher", "top-1 agreement", "perplexity", "on no token"]
    columns += ["parameters (M)"]
    table(f"{_text_of(run)}; errors over examples", columns, rows)
    _tell_seen(json.loads(run.path("evaluation.json").read_text())["seen_in_training"])
    put(run.path("evaluation.json"))


def _text_of(run) -> str:
    """What was measured on, in words."""
    asked = run.evaluate
    if asked is None or (not asked.corpus and asked.split == "heldout"):
        return f"held-out text of {run.name}"
    which = {"heldout": "held-out text", "train": "text of the training split"}[asked.split]
    return f"{which} of {asked.corpus or run.name}"


def _tell_seen(seen: dict[str, dict[str, int]]) -> None:
    """How much of the text a student was trained on; it looks better there than it is."""
    for where, found in seen.items():
        if found["itself"]:
            warn(f"warning: this is the text that a student was trained on ({where})")
        elif found["examples"]:
            said = f"measured answers that are in the training split of {where} too"
            part = f"{found['looked_through']:,} of its {found['of']:,} examples looked through"
            more = f" ({part}: at least)" if found["looked_through"] < found["of"] else ""
            say(f"{said}{more}: {shares(found)}")


def _check_options(tasks: str, rouge_l: bool, as_json: bool, of_tasks: dict[str, bool]) -> None:
    """Refuse options that nothing would follow."""
    from stillroom.cache_schemas.errors import ConfigError

    unheard = [name for name, given in of_tasks.items() if given and not tasks]
    if unheard:
        where = f"--{unheard[0]}"
        raise ConfigError("without --tasks", where=where, remedy="It is about tasks alone.")
    if tasks and rouge_l and as_json:
        where = "--tasks, --rouge-l, --json"
        raise ConfigError("two documents on stdout", where=where, remedy="Ask for one at a time.")


def _recommender(run, run_file: Path, as_json: bool) -> None:
    from stillroom.pipeline import provenance
    from stillroom.pipeline.evaluation.ranking import (
        RESULT,
        asked_on_test_rows,
        evaluate_recommender,
    )

    found = evaluate_recommender(run)
    if asked_on_test_rows(run) is None:
        command = f"stillroom capture {run_file} --split test"
        needs = "" if run.candidates else " (it needs [candidates])"
        say(f"no row for the teacher: it was not asked about test rows; {command}{needs}")
    provenance.record(run.path("run.json"), "evaluate")
    if as_json:
        document({label: one.facts for label, one in found.items()})
        return
    names = ["hr@1", "hr@5", "hr@10", "hr@20", "ndcg@5", "ndcg@10", "ndcg@20"]
    rows = [
        [_label(name, r), *(f"{r.mean[m]:.4f} ± {r.standard_error[m]:.4f}" for m in names)]
        for name, r in found.items()
    ]
    table(f"test rows, full ranking, {run.name}", ["", *names], rows)
    put(run.path(RESULT))


def _label(name: str, ranking) -> str:
    """A teacher that said nothing about some rows is not one that was wrong about them."""
    if not ranking.empty_lists:
        return name
    return f"{name} ({ranking.empty_lists:,} of {ranking.rows:,} lists empty)"
