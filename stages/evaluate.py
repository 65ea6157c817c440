"""`stillroom evaluate`: students against the live teacher on held-out text."""

from dataclasses import asdict
from pathlib import Path

from stillroom.stages.arguments import AsJson, RunFile
from stillroom.stages.console import document, progress, put, table


def evaluate(run_file: RunFile, as_json: AsJson = False) -> None:
    """Full-vocabulary KL to the teacher, top-1 agreement and perplexity of every student; for
    recommenders, hit rates and NDCG of student, teacher and the most popular items."""
    from stillroom.pipeline import config, provenance
    from stillroom.pipeline.evaluation.held_out import EvaluateProgress, students_of
    from stillroom.pipeline.evaluation.held_out import evaluate as measure
    from stillroom.pipeline.training.curves import draw_curves

    run = config.load(run_file)
    if run.recommender is not None:
        _recommender(run, as_json)
        return
    with progress("evaluate", "examples") as report:

        def show(now: EvaluateProgress) -> None:
            report(now.done, now.total, **{f"kl {k}": v for k, v in now.kl.items() if v})

        found = measure(run, show)
    provenance.record(run.path("run.json"), "evaluate")
    trained = {label: Path(path).parent for label, path in students_of(run).items()}
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
    table(f"text that nobody trained on, {run.name}; errors over examples", columns, rows)
    put(run.path("evaluation.json"))


def _recommender(run, as_json: bool) -> None:
    from stillroom.pipeline import provenance
    from stillroom.pipeline.evaluation.ranking import RESULT, evaluate_recommender

    found = evaluate_recommender(run)
    provenance.record(run.path("run.json"), "evaluate")
    if as_json:
        document({label: asdict(one) for label, one in found.items()})
        return
    names = ["hr@1", "hr@5", "hr@10", "hr@20", "ndcg@5", "ndcg@10", "ndcg@20"]
    rows = [
        [label, *(f"{r.mean[name]:.4f} ± {r.standard_error[name]:.4f}" for name in names)]
        for label, r in found.items()
    ]
    table(f"test rows, full ranking, {run.name}", ["", *names], rows)
    put(run.path(RESULT))
