"""`stillroom prepare`: make the corpus of a run from its sources."""

from typing import TYPE_CHECKING

from stillroom.stages.arguments import RunFile
from stillroom.stages.console import out, progress, say, table

if TYPE_CHECKING:
    from stillroom.pipeline.corpus.files import Corpus

COLUMNS = ("documents", "examples", "tokens", "targets")


def prepare(run_file: RunFile) -> None:
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

        def show(now: PrepareProgress) -> None:
            report(now.tokens, None, documents=now.documents, examples=now.examples)

        corpus = make_corpus(
            settings, teacher.model, run.path("corpus"), show, revision=teacher.revision
        )
    config.dump(run, run.path("corpus.config.json"))
    provenance.record(run.path("run.json"), "prepare")
    show_corpus(corpus)


def show_corpus(corpus: "Corpus") -> None:
    """What a corpus holds and what was left out of it; its directory on stdout."""
    counts = corpus.facts["counts"]
    rows = [[name, *(f"{counts[name][column]:,}" for column in COLUMNS)] for name in counts]
    table(f"corpus {corpus.digest[:12]}", ["split", *COLUMNS], rows)
    if "generated" in corpus.facts:
        ends = corpus.facts["generated"]["answers"]
        say(f"answers: {ends.get('ended', 0):,} ended, {ends.get('cut', 0):,} cut at the limit")
    for reason, number in corpus.facts["dropped"].items():
        say(f"left out: {number:,} {reason.replace('_', ' ')}")
    for fact, number in corpus.facts.get("interactions", {}).items():
        say(f"{fact.replace('_', ' ')}: {number:,}")
    out.print(str(corpus.directory))
