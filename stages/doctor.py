"""`stillroom doctor`: whether this machine can do the work, and what to do where it cannot."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from stillroom.cache_schemas.errors import EXIT_USER_ERROR
from stillroom.stages.arguments import AsJson
from stillroom.stages.console import document, progress, table, warn

MARKS = {"ok": "ok", "warning": "?", "failed": "NO"}


def doctor(
    run_file: Annotated[
        Path | None,
        typer.Argument(help="A run whose models are looked at too.", metavar="RUN.toml"),
    ] = None,
    serve: Annotated[bool, typer.Option(help="Start vLLM on a tiny model.")] = True,
    as_json: AsJson = False,
) -> None:
    """Check packages, device, disk, memory, hub and vLLM; exit 2 where something is missing."""
    from stillroom.pipeline import config

    run = config.load(run_file) if run_file else None
    from stillroom.pipeline.beginning.checks import findings

    found = []
    with progress("doctor", "checks") as report:
        for finding in findings(run, serve):
            found.append(finding)
            report(len(found), None)
    if as_json:
        document([asdict(finding) for finding in found])
    else:
        rows = [[finding.name, MARKS[finding.verdict], finding.found] for finding in found]
        table("this machine", ["", "", "found"], rows)
    for finding in found:
        if finding.remedy:
            warn(f"{finding.name}: {finding.remedy}")
    if any(finding.verdict == "failed" for finding in found):
        raise typer.Exit(EXIT_USER_ERROR)
