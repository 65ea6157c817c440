"""What the verbs of `stillroom cache` share: how a cache and its tokenizer are named.

One idea: wherever a cache is asked for, the run file that makes it will do. It opens no cache.
"""

from typing import Annotated

import typer

from cache_schemas.errors import PlanMismatch

Cache = Annotated[str, typer.Argument(help="Directory, URL or RUN.toml.", metavar="CACHE")]


def location(cache: str) -> str:
    """A cache's location, also from the run file that makes it."""
    if not cache.endswith(".toml"):
        return cache
    from pipeline import config

    return str(config.load(cache).path("cache"))


def tokenizer_of(cache: str) -> str:
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
