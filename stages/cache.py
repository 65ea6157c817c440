"""`stillroom cache`: look at caches, check them, mend them.

One idea: every verb takes a cache (directory, URL, or the run file that made it) and prints results
on stdout; exit code 0 means that the cache is what it claims to be.
"""

from pathlib import Path
from typing import Annotated

import typer

from cache_schemas.errors import CacheError, CacheIncomplete, PlanMismatch
from stages.console import out, progress, say, table

app = typer.Typer(help="Look at caches, check, mend and share them.", no_args_is_help=True)

Cache = Annotated[str, typer.Argument(help="Directory, URL or RUN.toml.", metavar="CACHE")]
Tokenizer = Annotated[str, typer.Option(help="HF directory or hub id, to show tokens in words.")]


@app.command()
def show(
    cache: Cache,
    example: Annotated[int, typer.Option(help="Which example to show.")] = 0,
    rows: Annotated[int, typer.Option(help="How many of its rows.", min=0)] = 8,
    guesses: Annotated[int, typer.Option(help="Top guesses per row.", min=1)] = 5,
    tokenizer: Tokenizer = "",
) -> None:
    """What a cache holds, and a few tokens with the teacher's top guesses."""
    from pipeline.cache.location import open_storage
    from pipeline.cache.overview import overview
    from stages.cache_view import facts_table, guesses_table

    storage = open_storage(location(cache))
    seen = overview(storage)
    facts_table(seen)
    if seen.sealed and rows:
        guesses_table(storage, example, rows, guesses, tokenizer or _tokenizer_of(cache))
    if not seen.sealed:
        left = seen.plan.num_shards - seen.shards_done
        say(f"not sealed: {left} of {seen.plan.num_shards} shards are missing")


@app.command()
def ls(
    directory: Annotated[Path, typer.Argument(help="Where to look.")] = Path("."),
) -> None:
    """The caches below a directory."""
    from pipeline.cache.overview import Overview, find
    from stages.cache_view import LS_COLUMNS, ls_row

    found = find(directory)
    rows = [ls_row(seen, directory) for seen in found if isinstance(seen, Overview)]
    table(str(directory), LS_COLUMNS, rows)
    for seen in found:
        if not isinstance(seen, Overview):
            say(f"{seen[0]}: {seen[1]}")


@app.command()
def verify(
    cache: Cache,
    public_key: Annotated[
        str, typer.Option(help="PEM file; the manifest must be signed by its owner.")
    ] = "",
) -> None:
    """Hash every file and decode every record again."""
    from pipeline.cache.location import open_storage
    from pipeline.cache.verification import verify

    storage = open_storage(location(cache))
    if public_key:
        from pipeline.cache.signing import check_signature

        check_signature(storage, public_key)
    with progress("verify", "shards") as report:
        result = verify(storage, report)
    for note in result.notes:
        say(f"note: {note}")
    for problem in result.problems:
        shard = "" if problem.shard is None else f"shard {problem.shard}: "
        say(f"{shard}{problem.name}: {problem.found}")
    out.print(
        f"{result.num_shards} shards, {result.num_examples:,} examples, {result.num_tokens:,} "
        f"tokens, {result.num_bytes:,} bytes are right"
    )
    if result.problems:
        raise CacheError(
            f"{len(result.problems)} problems",
            where=storage.location,
            remedy="Run `stillroom cache repair` where it was made, or pull it again.",
        )
    if not result.sealed:
        raise CacheIncomplete(
            "what is there is right, but the cache is not sealed",
            where=storage.location,
            remedy="Run the capture again to finish it.",
        )


@app.command()
def repair(cache: Cache) -> None:
    """Remove what is damaged, so that capture (or pull) redoes exactly that."""
    from pipeline.cache.location import open_storage
    from pipeline.cache.repair import repair

    storage = open_storage(location(cache))
    with progress("verify", "shards") as report:
        done = repair(storage, report)
    for name in done.removed:
        say(f"removed {name}")
    if done.sealed:
        out.print("the cache is whole and sealed")
        return
    listed = ", ".join(str(shard) for shard in done.shards) or "none"
    out.print(f"shards to capture again: {listed}")
    raise CacheIncomplete(
        "the cache is not sealed", where=storage.location, remedy="Run the capture again."
    )


def location(cache: str) -> str:
    """A cache's location, also from the run file that makes it."""
    if not cache.endswith(".toml"):
        return cache
    from pipeline import config

    return str(config.load(cache).path("cache"))


def _tokenizer_of(cache: str) -> str:
    """The tokenizer that a run file names; empty for anything else."""
    if not cache.endswith(".toml"):
        return ""
    from pipeline import config

    run = config.load(cache)
    named = run.prepare.tokenizer if run.prepare else ""
    return named or (run.teacher.model if run.teacher else "")


def check_tokenizer(model: str, expected: str) -> None:
    """Refuse a tokenizer that is not the cache's."""
    from pipeline.corpus_tokenizer import tokenizer_facts

    found = tokenizer_facts(model)["sha256"]
    if found != expected:
        raise PlanMismatch(
            f"the tokenizer's sha256 is {found[:12]}",
            expected=f"{expected[:12]}, the one the cache was made with",
            where=model,
            remedy="Name the teacher's own tokenizer with --tokenizer.",
        )
