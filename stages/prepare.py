"""`stillroom prepare`: make the corpus of a run from its sources."""

from pathlib import Path
from typing import Annotated

import typer

from stillroom.stages.console import out, progress, say, table
from stillroom.stages.corpus import present, tell

RunFile = Annotated[Path, typer.Argument(help="The run's TOML file.", metavar="RUN.toml")]
Show = Annotated[int, typer.Option(help="Show so many examples of the corpus.", min=0)]
AsJson = Annotated[bool, typer.Option("--json", help="What --show shows, as JSON.")]


def prepare(run_file: RunFile, show: Show = 0, as_json: AsJson = False) -> None:
    """Tokenise the sources, cut them into windows, split them by document."""
    from stillroom.cache_schemas.errors import ConfigError
    from stillroom.pipeline import config, provenance
    from stillroom.pipeline.corpus.preparing import PrepareProgress
    from stillroom.pipeline.corpus.preparing import prepare as make_corpus

    run = config.load(run_file)
    settings = config.require(run.prepare, "prepare", str(run_file))
    if run.generate is not None:
        raise ConfigError(
            "a [generate] table: this run's corpus is written by a model",
            where=str(run_file),
            remedy=f"Run: stillroom generate {run_file}",
        )
    teacher = run.teacher or config.Teacher(model="")
    with progress("prepare") as report:

        def show_progress(now: PrepareProgress) -> None:
            report(now.tokens, None, documents=now.documents, examples=now.examples)

        corpus = make_corpus(
            settings,
            teacher.model,
            run.path("corpus"),
            show_progress,
            revision=teacher.revision,
            say=lambda words: say(f"prepare: {words}"),
        )
    config.dump(run, run.path("corpus.config.json"))
    provenance.record(run.path("run.json"), "prepare")
    if as_json or show:
        present(run, corpus, show, as_json)
    if as_json:
        return
    counts = corpus.facts["counts"]
    rows = [[name, *(f"{counts[name][column]:,}" for column in COLUMNS)] for name in counts]
    table(f"corpus {corpus.digest[:12]}", ["split", *COLUMNS], rows)
    if not show:
        tell(corpus)
    out.print(str(corpus.directory))


COLUMNS = ("documents", "examples", "tokens", "targets")
