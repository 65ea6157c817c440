"""What the verbs of `stillroom cache` share: how a cache and its tokenizer are named.

One idea: wherever a cache is asked for, the run file that makes it will do; and a cache that still
lies in its run's directory has a tokenizer near. It opens no cache.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stillroom.cache_schemas.errors import ConfigError, PlanMismatch, StillroomError

if TYPE_CHECKING:
    from stillroom.pipeline.cache.storage.protocol import Storage

Cache = Annotated[str, typer.Argument(help="Directory, URL or RUN.toml.", metavar="CACHE")]
PublicKey = Annotated[str, typer.Option(help="PEM file; the manifest must be signed by its owner.")]


def check_signature(storage: "Storage", public_key: str) -> None:
    """Refuse a cache whose manifest the owner of the key, if one is given, has not signed."""
    if public_key:
        from stillroom.pipeline.cache.sharing import signing

        signing.check_signature(storage, public_key)


def location(cache: str) -> str:
    """A cache's location, also from the run file that makes it.

    Raises:
        ConfigError: that file makes several.
    """
    if not cache.endswith(".toml"):
        return cache
    from stillroom.pipeline import config

    run = config.load(cache)
    if run.capture is None and (run.items or run.candidates):
        raise ConfigError(
            "a run of [items] and [candidates] has a cache of each",
            expected=f"{run.path('items')} or {run.path('candidates')}",
            where=cache,
            remedy="Name the directory.",
        )
    return str(run.path("cache"))


def tokenizer_of(cache: str) -> str:
    """The tokenizer that a run file names; empty for anything else."""
    if not cache.endswith(".toml"):
        return ""
    from stillroom.pipeline import config

    run = config.load(cache)
    named = run.prepare.tokenizer if run.prepare else ""
    return named or (run.teacher.model if run.teacher else "")


def tokenizer_near(cache: str, expected: str) -> str:
    """A directory with the tokenizer of that sha256: of the teacher that the run names, or of a
    student made from it; empty where there is none."""
    from stillroom.pipeline.corpus.tokenizer import tokenizer_facts

    for directory in _models_near(Path(cache).parent):
        try:
            if tokenizer_facts(str(directory))["sha256"] == expected:
                return str(directory)
        except StillroomError:
            continue
    return ""


def _models_near(run: Path) -> Iterator[Path]:
    """Model directories that the settings kept in a run's directory name, and its students."""
    for file in sorted(run.glob("*.config.json")):  # as `config.dump` leaves them
        settings = json.loads(file.read_text())
        for table, key in (("teacher", "model"), ("prepare", "tokenizer")):
            named = (settings.get(table) or {}).get(key)
            if named and Path(named, "tokenizer.json").is_file():
                yield Path(named)
    yield from (run / name for name in ("student-initial", "student") if (run / name).is_dir())


def check_tokenizer(model: str, expected: str) -> None:
    """Refuse a tokenizer that is not the cache's."""
    from stillroom.pipeline.corpus.tokenizer import tokenizer_facts

    found = tokenizer_facts(model)["sha256"]
    if found != expected:
        raise PlanMismatch(
            f"the tokenizer's sha256 is {found[:12]}",
            expected=f"{expected[:12]}, the one the cache was made with",
            where=model,
            remedy="Name the teacher's own tokenizer with --tokenizer.",
        )
