"""`stillroom config` and `stillroom schema`: a run file with all that it leaves out, and what may
be in one.

One idea: both are read off the models that check a run file, so neither can be out of date.
"""

from typing import Annotated

import typer

from stillroom.stages.arguments import RunFile
from stillroom.stages.console import document, put

INTRODUCTION = """# Run files: every table and key

A run is one TOML file. This page is written from the models that check it: `stillroom schema
--page`. For an editor, `stillroom schema > run.schema.json`; of one run, with every default spelled
out, `stillroom config RUN.toml`. A key that is not here is refused with the nearest one. A path may
begin with `~` and hold `$VARIABLES`.
"""

SWEEPS = """# Sweep files

Several students off one base run: `stillroom train --sweep SWEEP.toml`.
"""


def config(run_file: RunFile) -> None:
    """Print a run as it will be read: every default spelled out, as JSON."""
    from stillroom.pipeline.config import load

    document(load(run_file).model_dump(mode="json"))


def schema(
    page: Annotated[bool, typer.Option("--page", help="As a page of Markdown instead.")] = False,
) -> None:
    """Print what a run file may hold, as a JSON schema."""
    from stillroom.pipeline.config import Run

    if page:
        put(reference())
    else:
        document(Run.model_json_schema())


def reference() -> str:
    """The page `runbooks/reference.md`."""
    import stillroom.pipeline.objectives  # noqa: F401  (it registers them)
    from stillroom.pipeline.config import Run
    from stillroom.pipeline.config.reference import page
    from stillroom.pipeline.config.sweep import Sweep
    from stillroom.pipeline.objectives.registry import OBJECTIVES

    options = {f'`[[objective]] name = "{n}"`, `options`': s.options for n, s in OBJECTIVES.items()}
    return f"{INTRODUCTION}\n{page(Run, options)}\n{SWEEPS}\n{page(Sweep, {})}"
