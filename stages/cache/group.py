"""`stillroom cache`: look at caches, check them, mend them.

One idea: every verb takes a cache (directory, URL, or the run file that made it) and prints results
on stdout; exit code 0 means that the cache is what it claims to be.
"""

import os
from pathlib import Path
from typing import Annotated

import typer

from stillroom.cache_schemas.errors import CacheError, CacheIncomplete
from stillroom.stages.arguments import AsJson
from stillroom.stages.cache import compare, foreign, plan, share
from stillroom.stages.cache.arguments import (
    Cache,
    PublicKey,
    check_signature,
    location,
    tokenizer_near,
    tokenizer_of,
)
from stillroom.stages.console import document, progress, put, say, table, warn

app = typer.Typer(help="Look at caches, check, mend and share them.", no_args_is_help=True)

Tokenizer = Annotated[str, typer.Option(help="HF directory or hub id, to show tokens in words.")]


@app.command()
def show(
    cache: Cache,
    example: Annotated[int, typer.Option(help="Which example to show.")] = 0,
    rows: Annotated[int, typer.Option(help="How many of its rows.", min=0)] = 8,
    guesses: Annotated[int, typer.Option(help="Top guesses per row.", min=1)] = 5,
    tokenizer: Tokenizer = "",
    corpus: Annotated[str, typer.Option(help="Of a cache of items or lists, for titles.")] = "",
    as_json: AsJson = False,
) -> None:
    """What a cache holds, and a few tokens with the teacher's top guesses; of a cache about a
    catalogue an item, or a history with the teacher's list and what came."""
    from stillroom.pipeline.cache.care.overview import overview
    from stillroom.pipeline.cache.storage.location import open_storage
    from stillroom.stages.cache.lists_view import catalogue_table, is_about_a_catalogue
    from stillroom.stages.cache.view import facts_json, facts_table, guesses_table

    storage = open_storage(location(cache))
    seen = overview(storage)
    if as_json:
        document(facts_json(seen))
        return
    facts_table(seen)
    expected = str(seen.plan.facts["tokenizer"].get("sha256", ""))
    named = tokenizer or tokenizer_of(cache) or tokenizer_near(cache, expected)
    if seen.sealed and rows and is_about_a_catalogue(seen.plan):
        catalogue_table(storage, example, corpus, named)
    elif seen.sealed and rows:
        guesses_table(storage, example, rows, guesses, named)
    if not seen.sealed:
        left = seen.plan.num_shards - seen.shards_done
        warn(f"not sealed: {left} of {seen.plan.num_shards} shards are missing")


@app.command()
def ls(
    directory: Annotated[Path, typer.Argument(help="Where to look.")] = Path("."),
    as_json: AsJson = False,
) -> None:
    """The caches below a directory."""
    from stillroom.pipeline.cache.care.overview import Overview, find
    from stillroom.stages.cache.view import LS_COLUMNS, ls_json, ls_row

    found = find(directory)
    if as_json:
        document(ls_json(found))
        return
    rows = [ls_row(seen, directory) for seen in found if isinstance(seen, Overview)]
    if not found:
        say(f"no cache in {directory}, nor in what it holds")
        return
    table(str(directory), LS_COLUMNS, rows)
    for seen in found:
        if not isinstance(seen, Overview):
            warn(f"{seen[0]}: {seen[1]}")


@app.command()
def verify(
    cache: Cache,
    public_key: PublicKey = "",
    workers: Annotated[int, typer.Option(help="Processes; 0: one for each core.", min=0)] = 0,
) -> None:
    """Hash every file, decode every record again, and see that all values make sense."""
    from stillroom.pipeline.cache.care.verification import verify
    from stillroom.pipeline.cache.storage.location import open_storage
    from stillroom.pipeline.cache.storage.snapshot import pinned

    storage = pinned(open_storage(location(cache)))
    check_signature(storage, public_key)
    with progress("verify", "shards") as report:
        result = verify(storage, report, workers or len(os.sched_getaffinity(0)))
    for note in result.notes:
        say(f"note: {note}")
    for problem in result.problems:
        shard = "" if problem.shard is None else f"shard {problem.shard}: "
        warn(f"{shard}{problem.name}: {problem.found}")
    put(
        f"{result.num_shards} shards, {result.num_examples:,} examples, {result.num_tokens:,} "
        f"tokens, {result.num_bytes:,} bytes are right"
    )
    if result.rounding is not None:
        put(f"rounding costs {result.rounding:.2g} nats per row, measured on every row")
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
            remedy="Run the same `stillroom capture` again to finish it.",
        )


@app.command()
def repair(cache: Cache) -> None:
    """Remove what is damaged, so that capture (or pull) redoes exactly that."""
    from stillroom.pipeline.cache.care.repair import repair
    from stillroom.pipeline.cache.storage.location import open_storage

    storage = open_storage(location(cache))
    with progress("verify", "shards") as report:
        done = repair(storage, report)
    for name in done.removed:
        say(f"removed {name}")
    if done.sealed:
        put("the cache is whole and sealed")
        return
    listed = ", ".join(str(shard) for shard in done.shards) or "none"
    put(f"shards to capture again: {listed}")
    raise CacheIncomplete(
        "the cache is not sealed", where=storage.location, remedy="Run the capture again."
    )


for verb in (
    share.push,
    share.pull,
    share.sign,
    share.merge,
    share.subset,
    share.reshard,
    compare.diff,
    compare.audit,
    plan.plan,
):
    app.command()(verb)
app.command("import")(foreign.import_)
app.command()(foreign.export)
