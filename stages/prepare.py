"""`stillroom prepare`: make the corpus of a run from its sources."""

from typing import TYPE_CHECKING, Annotated

import typer

from stillroom.stages.arguments import RunFile
from stillroom.stages.console import progress, put, say, table
from stillroom.stages.corpus import AsJson, present, tell

if TYPE_CHECKING:
    from stillroom.pipeline.corpus.files import Corpus

COLUMNS = ("documents", "examples", "tokens", "targets")
TIES = "interactions at the same time as another of their user (ordered by item id)"
SAID_OF = {
    "interactions_at_one_time_with_another_of_their_user": TIES,
    "at_the_time_of_the_one_before": TIES,  # corpora of earlier releases
}
"""Facts of a corpus that need more words than their name."""
Show = Annotated[int, typer.Option(help="Show so many examples of the corpus.", min=0)]


def prepare(run_file: RunFile, show: Show = 0, as_json: AsJson = False) -> None:
    """Tokenise the sources, cut them into windows, split them by document."""
    from stillroom.cache_schemas.errors import ConfigError
    from stillroom.pipeline import config, provenance

    run = config.load(run_file)
    settings = config.require(run.prepare, "prepare", str(run_file))
    if run.generate is not None:
        raise ConfigError(
            "a [generate] table: this run's corpus is written by a model",
            where=str(run_file),
            remedy=f"Run: stillroom generate {run_file}",
        )
    teacher = run.teacher or config.Teacher(model="")
    from stillroom.pipeline.corpus.opening import check_there
    from stillroom.pipeline.corpus.preparing import PrepareProgress
    from stillroom.pipeline.corpus.preparing import prepare as make_corpus

    for source in settings.source:
        check_there(source)
    from stillroom.pipeline.objectives.names import check_names

    check_names(run)
    with progress("prepare") as report:

        def show_progress(now: PrepareProgress) -> None:
            report(now.tokens, None, documents=now.documents, examples=now.examples)

        corpus = make_corpus(
            settings,
            teacher.model,
            run.path("corpus"),
            show_progress,
            revision=teacher.revision,
            trusts_code=teacher.trust_remote_code,
            say=lambda words: say(f"prepare: {words}"),
        )
    if run.candidates is not None and "catalogue" in corpus.facts:
        run.candidates.check_fits(corpus.facts["catalogue"]["items"])
    config.dump(run, run.path("corpus.config.json"))
    provenance.record(run.path("run.json"), "prepare")
    if as_json or show:
        present(run, corpus, show, as_json)
    if not as_json:
        show_corpus(corpus, told=show > 0)


def show_corpus(corpus: "Corpus", told: bool = False) -> None:
    """What a corpus holds and, unless it was told, what was left out; its directory on stdout."""
    counts = corpus.facts["counts"]
    called = {"heldout": "test"} if "interactions" in corpus.facts else {}
    rows = [
        [called.get(name, name), *(f"{counts[name][column]:,}" for column in COLUMNS)]
        for name in counts
    ]
    table(f"corpus {corpus.digest[:12]}", ["split", *COLUMNS], rows)
    if "generated" in corpus.facts:
        ends = corpus.facts["generated"]["answers"]
        say(f"answers: {ends.get('ended', 0):,} ended, {ends.get('cut', 0):,} cut at the limit")
    for fact, number in corpus.facts.get("interactions", {}).items():
        if number:
            said = SAID_OF.get(fact) or str(fact).replace("_", " ")
            say(f"{said}: {number:,}")
    if not told:
        tell(corpus)
    put(corpus.directory)
