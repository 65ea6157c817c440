"""`stillroom evaluate`: students against the live teacher on held-out text."""

from pathlib import Path

from stillroom.stages.arguments import RunFile
from stillroom.stages.console import out, progress, table


def evaluate(run_file: RunFile) -> None:
    """Full-vocabulary KL to the teacher, top-1 agreement and perplexity of every student."""
    from stillroom.pipeline import config, provenance
    from stillroom.pipeline.evaluation.held_out import EvaluateProgress, students_of
    from stillroom.pipeline.evaluation.held_out import evaluate as measure
    from stillroom.pipeline.training.curves import draw_curves

    run = config.load(run_file)
    with progress("evaluate", "examples") as report:

        def show(now: EvaluateProgress) -> None:
            report(now.done, now.total, **{f"kl {k}": v for k, v in now.kl.items() if v})

        found = measure(run, show)
    provenance.record(run.path("run.json"), "evaluate")
    trained = {label: Path(path).parent for label, path in students_of(run).items()}
    trained.pop("before", None)
    draw_curves(trained, run.path("curves.png"))
    rows = [
        [
            label,
            f"{scores.kl:.4f} ± {scores.kl_standard_error:.4f}",
            f"{scores.top1:.3f}",
            f"{scores.perplexity:,.1f}",
            f"{scores.parameters / 1e6:,.1f}",
        ]
        for label, scores in found.items()
    ]
    columns = ["model", "KL to teacher", "top-1 agreement", "perplexity", "parameters (M)"]
    table(f"held-out text, {run.name}", columns, rows)
    out.print(str(run.path("evaluation.json")))
