"""`stillroom cache push | pull | sign | merge | subset | reshard`: caches that come from caches.

One idea: every verb here makes another cache out of a sealed one, can be run again after any
interruption, and ends with the location of what it made on stdout.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stillroom.cache_schemas.errors import ConfigError
from stillroom.stages.cache.arguments import Cache, PublicKey, check_signature, location
from stillroom.stages.console import progress, put, say

if TYPE_CHECKING:
    from stillroom.pipeline.cache.reader import TeacherCache
    from stillroom.pipeline.cache.sharing.copying import Copied
    from stillroom.pipeline.cache.sharing.published_card import About
    from stillroom.pipeline.cache.storage.protocol import Storage

Target = Annotated[str, typer.Argument(help="Directory or URL.", metavar="TARGET")]
Signals = Annotated[
    list[str] | None,
    typer.Option(help="A dense signal to take, such as hidden.12; 'logits' for none. Repeatable."),
]
Threads = Annotated[int, typer.Option(min=1, help="Shards in flight.")]


def push(
    cache: Cache,
    target: Target,
    signal: Signals = None,
    threads: Threads = 8,
    license: Annotated[str, typer.Option(help="On a hub's card, such as apache-2.0.")] = "",
    language: Annotated[
        list[str] | None, typer.Option(help="On the card, such as en. Repeatable.")
    ] = None,
    source_dataset: Annotated[
        list[str] | None, typer.Option(help="Hub id of where the text is from. Repeatable.")
    ] = None,
    tokenizer: Annotated[
        str, typer.Option(help="The teacher's: readable rows are pushed to a hub, and shown first.")
    ] = "",
    readable: Annotated[int, typer.Option(min=0, help="Examples in readable rows.")] = 1000,
) -> None:
    """Copy a sealed cache to a bucket, directory or hub; the manifest travels last."""
    from stillroom.pipeline.cache.sharing import hub
    from stillroom.pipeline.cache.sharing.published_card import About

    source = location(cache)
    if target.startswith(hub.PROTOCOL):
        about = About(license, tuple(language or ()), tuple(source_dataset or ()))
        _publish(source, target, signal, about, readable and tokenizer, readable)
    elif license or language or source_dataset or tokenizer:
        raise ConfigError("only a hub has a card", where=target, expected=f"{hub.PROTOCOL}...")
    else:
        _copy(source, target, signal, threads, "push", own="://" not in source)


def pull(
    cache: Cache,
    target: Target,
    signal: Signals = None,
    threads: Threads = 8,
    public_key: PublicKey = "",
) -> None:
    """Copy a cache from a bucket or web server, verified on arrival."""
    from stillroom.pipeline.cache.storage.location import open_storage
    from stillroom.pipeline.cache.storage.snapshot import pinned

    source = pinned(open_storage(cache))
    check_signature(source, public_key)
    _copy(source, target, signal, threads, "pull")


def sign(
    cache: Cache,
    key: Annotated[Path, typer.Option(help="PEM file with an ed25519 private key.")],
) -> None:
    """Sign the manifest, and with it every byte of the cache."""
    from stillroom.pipeline.cache.sharing.signing import sign
    from stillroom.pipeline.cache.storage.location import open_storage

    storage = open_storage(location(cache))
    sign(storage, key)
    put(f"{storage.location}/manifest.sig")


def merge(
    target: Target,
    caches: Annotated[list[str], typer.Argument(help="Two or more caches.", metavar="CACHE...")],
    recode: Annotated[
        bool, typer.Option(help="Encode again where codec tables differ; adds its error again.")
    ] = False,
) -> None:
    """One cache of all examples of several caches of one teacher."""
    from stillroom.pipeline.cache.reader import TeacherCache
    from stillroom.pipeline.cache.sharing.rewriting import merge

    if len(caches) < 2:
        raise ConfigError("one cache", expected="two or more", where="merge")
    opened = [TeacherCache.open(location(cache)) for cache in caches]
    with progress("merge", "shards") as report:
        merge(opened, target, recode, report)
    put(target)


def subset(
    cache: Cache,
    target: Target,
    source: Annotated[list[str] | None, typer.Option(help="Keep this source. Repeatable.")] = None,
    min_entropy: Annotated[float | None, typer.Option(help="Least mean entropy, nats.")] = None,
    max_entropy: Annotated[float | None, typer.Option(help="Largest mean entropy, nats.")] = None,
    examples: Annotated[int, typer.Option(min=0, help="At most so many examples.")] = 0,
    tokens: Annotated[int, typer.Option(min=0, help="At most so many tokens.")] = 0,
) -> None:
    """A cache of some of the examples, by source, entropy or size."""
    from stillroom.pipeline.cache.reader import TeacherCache
    from stillroom.pipeline.cache.sharing.rewriting import Selection, subset

    opened = TeacherCache.open(location(cache))
    chosen = Selection(tuple(source or ()), (min_entropy, max_entropy), examples, tokens)
    with progress("subset", "shards") as report:
        subset(opened, target, chosen, report)
    put(target)


def reshard(
    cache: Cache,
    target: Target,
    examples_per_shard: Annotated[int, typer.Option(min=1, help="Size of the new shards.")],
    profile: Annotated[
        str, typer.Option(help="Encode again: small, strict, exact, portable.")
    ] = "",
) -> None:
    """The same examples in shards of another size, or in another codec profile."""
    from stillroom.pipeline.cache.reader import TeacherCache
    from stillroom.pipeline.cache.sharing.rewriting import reshard

    if profile not in ("", "small", "strict", "exact", "portable"):
        known = "small, strict, exact or portable"
        raise ConfigError(f"unknown profile '{profile}'", expected=known, where="--profile")
    opened = TeacherCache.open(location(cache))
    with progress("reshard", "shards") as report:
        reshard(opened, target, examples_per_shard, profile, report)
    put(target)


def _copy(
    source: "str | Storage",
    target: str,
    signals: list[str] | None,
    threads: int,
    title: str,
    own: bool = False,
) -> None:
    from stillroom.pipeline.cache.sharing.copying import copy
    from stillroom.pipeline.cache.storage.location import open_storage

    end = open_storage(target)
    with progress(title, "shards") as report:
        done = copy(open_storage(source), end, signals, threads, report, readme=own)
    _say_copied(done, end.location)


def _publish(
    source: str,
    target: str,
    signals: list[str] | None,
    about: "About",
    tokenizer: str | int,
    count: int,
) -> None:
    from stillroom.pipeline.cache.sharing import hub

    if not Path(source).is_dir():
        raise ConfigError(
            "not a directory",
            where=source,
            remedy="Pull it into a directory first, and push that.",
        )
    if about.told or tokenizer:
        hub.check_card_counts(target)
    rows = _rows(Path(source), str(tokenizer), count) if tokenizer else b""
    with progress("verify", "shards") as report:
        done = hub.push(Path(source), target, signals, report, about, rows)
    _say_copied(done, target)


def _rows(source: Path, tokenizer: str, count: int) -> bytes:
    """Rows that a person can read."""
    from stillroom.pipeline.cache.reader import TeacherCache
    from stillroom.pipeline.cache.sharing.readable import readable_rows
    from stillroom.pipeline.corpus.tokenizer import load_tokenizer, tokenizer_facts
    from stillroom.pipeline.training.run import check_tokenizer

    cache = TeacherCache.open(source)
    check_tokenizer(tokenizer_facts(tokenizer), {"the cache": cache}, tokenizer)
    words = load_tokenizer(tokenizer)
    records = (cache.read(number, _readable(cache)) for number in range(len(cache)))
    return readable_rows(records, words.decode, count)


def _readable(cache: "TeacherCache") -> list[str]:
    wanted = ("topk_ids", "topk_logprobs", "entropy")
    return [name for name in wanted if name in cache.signals]


def _say_copied(done: "Copied", where: str) -> None:
    say(f"{done.files:,} files, {done.num_bytes:,} bytes; dense: {', '.join(done.dense) or 'none'}")
    put(where)
