"""`stillroom cache plan`: what each setting would cost and keep, before the teacher is run.

One idea: a few examples are scored once and coded in every way; a person is told what that costs
before it begins, sees the frontier, and gets a run file with the setting that fits and the reason
for it. The measuring is `pipeline.planning.frontier`.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from stillroom.cache_schemas.errors import ConfigError
from stillroom.stages.arguments import AsJson, Engine, EngineChoice
from stillroom.stages.console import document, progress, put, say, table
from stillroom.stages.progress_line import clock

COLUMNS = ["k", "tail", "profile", "B/token", "mass", "KL", "error", "GB"]
PARTS = ["bias", "noise"]
"""Of the error, shown with `--all`: where every column is, 80 characters are too few."""

BUDGET = 40.0
"""The size at which students did as well as on 64 ids and a bucket (runbooks/decisions/0031)."""


def plan(
    run_file: Annotated[Path, typer.Argument(help="Run file with a prepared corpus.")],
    budget: Annotated[
        float | None,
        typer.Option(help=f"Bytes per token, at most; 0: none. {BUDGET:g} without --max-kl."),
    ] = None,
    max_kl: Annotated[float, typer.Option(help="Nats that storing may add; 0: any.")] = 0.0,
    examples: Annotated[
        int, typer.Option(help="Examples to score; 0: as many as 10 % of the capture allow.", min=0)
    ] = 0,
    engine: EngineChoice = Engine.vllm,
    write: Annotated[str, typer.Option(help="New run file; default: NAME.planned.toml.")] = "",
    every: Annotated[
        bool, typer.Option("--all", help="Show every setting, and what its error is made of.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print and plot the rate-distortion frontier; write the run file with the best setting. Costs
    about a tenth of the capture, and the start of the engine."""
    from stillroom.pipeline import config
    from stillroom.pipeline.planning import files as plan_files
    from stillroom.pipeline.planning import frontier as planning
    from stillroom.pipeline.planning.reasons import why

    if budget is None:
        budget = 0.0 if max_kl else BUDGET  # one limit is enough
    if budget < 0 or max_kl < 0:
        raise ConfigError("a limit below 0", where="--budget, --max-kl")
    target = write or str(run_file.with_suffix(".planned.toml"))
    if Path(target).is_dir():
        raise ConfigError("is a directory", expected="a file to write", where=target)
    run = config.load(run_file)
    size = planning.size_of(run, examples)
    say(
        f"planning scores {size.examples:,} of {size.every_example:,} examples, "
        f"{size.tokens / max(size.every_token, 1):.1%} of the capture, then codes them every way: "
        f"at most {planning.COST:.0%} of the capture's time, and the start of the engine"
    )
    with progress("score", "examples") as report:
        sample = planning.sample(run, engine.value, size.examples, report)
    left = None if examples else sample.left
    say(_expected(sample, left))
    with progress("measure", "settings") as report:
        points = planning.frontier(sample, on_progress=report, seconds=left)
    chosen = planning.choose(points, budget or None, max_kl or None)
    reason = why(points, chosen, budget or None, max_kl or None)
    picture = run.path("plan.png")
    plan_files.plot(points, chosen, picture)
    plan_files.write_run(run_file, target, chosen.setting.table())
    if as_json:
        settings = [asdict(point) for point in points]
        document({"settings": settings, "chosen": asdict(chosen), "why": reason, "run": target})
        return
    shown = [point for point in points if every or point.efficient or point is chosen]
    columns = [*COLUMNS, *PARTS] if every else COLUMNS
    rows = [_cells(point, chosen)[: len(columns)] for point in shown]
    table(f"{run.name}: bytes and gradient error", columns, rows)
    put(f"{chosen.bytes_per_token:.1f} bytes/token, {chosen.corpus_bytes / 1e9:.3g} GB for "
        f"{sample.corpus_rows:,} rows, {chosen.hours:.2g} hours on this machine")  # fmt: skip
    put(f"* chosen: {reason}")
    say(f"run file: {target}")
    say(f"picture: {picture}")


def _expected(sample, left: float | None) -> str:  # type: ignore[no-untyped-def]
    """What the capture will take, and what measuring may."""
    told = f"the capture will take about {clock(sample.capture_seconds)} on this machine"
    if left is None:
        return f"{told}; --examples was given, so all of the sample is coded"
    return f"{told}; measuring may take {clock(left)}, and as long as 512 rows need"


def _cells(point, chosen) -> list[str]:  # type: ignore[no-untyped-def]
    setting = point.setting
    profile = (
        f"small {_short(setting.mean_kl, 0)}" if setting.profile == "small" else setting.profile
    )
    return [
        f"{setting.k} *" if point is chosen else str(setting.k),
        setting.tail,
        profile,
        f"{point.bytes_per_token:.1f}",
        f"{point.retained_mass:.3f}",
        _short(point.kl_added),
        _short(point.gradient_error),
        f"{point.corpus_bytes / 1e9:.3g}",
        _short(point.gradient_bias),
        _short(point.gradient_noise),
    ]


def _short(value: float, digits: int = 1) -> str:
    """A small number, such as 9.5e-5."""
    return f"{value:.{digits}e}".replace("e-0", "e-") if value else "0"
