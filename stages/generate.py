"""`stillroom generate`: a corpus that the teacher writes, in place of one that is found."""

from typing import Annotated

import typer

from stillroom.stages.arguments import Engine, Rank, RunFile, WorldSize, check_worker
from stillroom.stages.console import progress, say
from stillroom.stages.prepare import show_corpus


def generate(
    run_file: RunFile,
    engine: Annotated[Engine, typer.Option(help="What runs whoever writes.")] = Engine.vllm,
    rank: Rank = 0,
    world_size: WorldSize = 1,
    side_by_side: Annotated[
        int,
        typer.Option(
            min=0, help="Instead: show what teacher and students answer to held-out text."
        ),
    ] = 0,
) -> None:
    """Answer the prompts of the run's sources; the answers become its corpus."""
    if side_by_side:
        from stillroom.stages.measures import show_answers

        show_answers(run_file, side_by_side)
        return
    from stillroom.pipeline import config, provenance

    run = config.load(run_file)
    check_worker(rank, world_size)
    config.require(run.generate, "generate", str(run_file))
    from stillroom.pipeline.generation.written_corpus import GenerateProgress
    from stillroom.pipeline.generation.written_corpus import generate as write

    with progress("generate", unit="prompts") as report:

        def show(now: GenerateProgress) -> None:
            report(now.prompts, now.total_prompts, answers=now.answers, tokens=now.tokens)

        workers = {"rank": rank, "world_size": world_size}
        corpus = write(run, engine=engine.value, on_progress=show, **workers)
    config.dump(run, run.path("generate.config.json"))
    provenance.record(run.path("run.json"), "generate")
    if corpus is None:  # parts of other workers are missing
        say("this worker's prompts are answered; the last worker to finish makes the corpus")
        return
    show_corpus(corpus)
