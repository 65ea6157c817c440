"""`stillroom generate`: a corpus that the teacher writes, in place of one that is found."""

from pathlib import Path
from typing import Annotated

import typer

from stillroom.stages.capture import Engine
from stillroom.stages.console import out, progress, say, table

RunFile = Annotated[Path, typer.Argument(help="The run's TOML file.", metavar="RUN.toml")]


def generate(
    run_file: RunFile,
    engine: Annotated[Engine, typer.Option(help="What runs whoever writes.")] = Engine.vllm,
    rank: Annotated[int, typer.Option(min=0, help="This worker, from 0.")] = 0,
    world_size: Annotated[int, typer.Option(min=1, help="How many workers share the work.")] = 1,
) -> None:
    """Answer the prompts of the run's sources; the answers become its corpus."""
    from stillroom.cache_schemas.errors import ConfigError
    from stillroom.pipeline import config, provenance
    from stillroom.pipeline.generation.written_corpus import GenerateProgress
    from stillroom.pipeline.generation.written_corpus import generate as write

    run = config.load(run_file)
    if rank >= world_size:
        raise ConfigError(
            f"--rank {rank} of {world_size} workers", expected=f"0 to {world_size - 1}"
        )
    with progress("generate", unit="prompts") as report:

        def show(now: GenerateProgress) -> None:
            report(now.prompts, now.total_prompts, answers=now.answers, tokens=now.tokens)

        workers = {"rank": rank, "world_size": world_size}
        corpus = write(run, engine=engine.value, on_progress=show, **workers)
    config.dump(run, run.path("generate.config.json"))
    provenance.record(run.path("run.json"), "generate")
    if corpus is None:
        say("this worker's prompts are answered; the last worker to finish makes the corpus")
        return
    counts = corpus.facts["counts"]
    rows = [[name, *(f"{counts[name][column]:,}" for column in COLUMNS)] for name in counts]
    table(f"corpus {corpus.digest[:12]}", ["split", *COLUMNS], rows)
    endings = corpus.facts["generated"]["answers"]
    say(f"answers: {endings.get('ended', 0):,} ended, {endings.get('cut', 0):,} cut at the limit")
    for reason, number in corpus.facts["dropped"].items():
        say(f"left out: {number:,} {reason.replace('_', ' ')}")
    out.print(str(corpus.directory))


COLUMNS = ("documents", "examples", "tokens", "targets")
