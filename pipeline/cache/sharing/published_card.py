"""The card of a cache at the place that it is pushed to, where people may have written on one.

One idea: what follows from the plan can be written again at any time, so what counts is what
people wrote, in the card that is there and in the one that lies in the cache: both stay. Where they
say two different things nobody here chooses. Which tables a viewer offers follows from the files.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stillroom.cache_schemas.errors import CacheError, ConfigError
from stillroom.cache_schemas.manifest import Plan
from stillroom.pipeline.cache.card import README, SHOWS_INDEX, SHOWS_ROWS, card
from stillroom.pipeline.cache.sharing.readable import FILE
from stillroom.pipeline.hub_card import card_of

LICENCE, LANGUAGE = r"[a-z0-9][a-z0-9.-]*", r"[a-z]{2,3}(-[A-Za-z0-9]+)*"
ROWS, CONFIGS = "readable", "configs"
OPTIONS = {
    "language": "--language",
    "license": "--license",
    "source_datasets": "--source-dataset",
}
"""Key of a card -> what says it in a push."""


@dataclass(frozen=True, slots=True)
class About:
    """What a cache's own files do not say of it.

    Attributes:
        license: the hub's name of a licence; empty leaves what is there.
        languages: ISO 639 codes.
        source_datasets: hub ids of the data sets that its text is from.
    """

    license: str = ""
    languages: tuple[str, ...] = ()
    source_datasets: tuple[str, ...] = ()

    @property
    def told(self) -> dict[str, Any]:
        """Key of a card -> what is said, where something is."""
        told = {
            "license": self.license,
            "language": list(self.languages),
            "source_datasets": list(self.source_datasets),
        }
        return {key: value for key, value in told.items() if value}

    def __post_init__(self):
        if self.license and not re.fullmatch(LICENCE, self.license):
            raise _unusable("--license", self.license, "the hub's name of one, such as apache-2.0")
        for code in self.languages:
            if not re.fullmatch(LANGUAGE, code):
                raise _unusable("--language", code, "an ISO 639 code, such as en")


def _unusable(option: str, found: str, expected: str) -> ConfigError:
    return ConfigError(f"'{found}'", expected=expected, where=option)


def published_card(
    plan: Plan,
    own: bytes | None,
    there: bytes | None,
    about: About,
    has_rows: bool,
    where: str,
) -> bytes | None:
    """The README of a cache at a place.

    Args:
        plan: of the cache.
        own: README that lies in the cache; None: it was deleted.
        there: README that is at the place already; None: there is none.
        about: replaces what stands in either.
        has_rows: rows that a person can read lie at the place, or are put there now.
        where: the place, for messages.

    Returns:
        None where there is none and nothing to say.

    Raises:
        CacheError: a card cannot be read, or both were written on and say different things.
    """
    as_it_is = not about.told and not has_rows and FILE.encode() not in (own or b"")
    if there in (None, own) and as_it_is:
        return own
    from huggingface_hub import DatasetCard

    made = card(plan)
    base = card_of(DatasetCard, made, README)
    mine = card_of(DatasetCard, own or made, f"{README} of the cache")
    theirs = card_of(DatasetCard, there or own or made, f"{where}/{README}")
    text = _words(base.text, mine.text, theirs.text, where)
    theirs.text = text.replace(SHOWS_INDEX, SHOWS_ROWS) if has_rows else text
    before, now, later = (vars(one.data) for one in (base, mine, theirs))
    for key in sorted((now.keys() | about.told.keys()) - {CONFIGS}):
        given = about.told.get(key)
        value = given or _fact(key, before.get(key), now.get(key), later.get(key), where)
        setattr(theirs.data, key, value)
    theirs.data.configs = _configs([*_listed(later), *_listed(now)], has_rows)
    return str(theirs).encode()


def _words(made: str, own: str, there: str, where: str) -> str:
    """Of two texts the one that holds every line which a person wrote in the other."""
    ours = {*made.splitlines(), *SHOWS_ROWS.splitlines(), ""}
    mine, theirs = ({line.rstrip() for line in text.splitlines()} - ours for text in (own, there))
    if mine <= theirs:
        return there
    if theirs <= mine:
        return own
    raise CacheError(
        f"{README} has words that the cache's own lacks, and the cache's has others "
        f"('{min(theirs - mine)[:60]}'; '{min(mine - theirs)[:60]}')",
        expected="one of the two with all of them, which is the one that stays",
        where=where,
        remedy=f"Put into the cache's {README} what is to stay, or delete the one that is there.",
    )


def _fact(key: str, made: Any, own: Any, there: Any, where: str) -> Any:
    """What a person wrote for a key, on whichever side."""
    if there is None or there in (made, own):
        return own
    if own in (None, made):
        return there
    raise CacheError(
        f"{README} says {key}: {there!r}, and the cache's own {own!r}",
        expected="one of the two",
        where=where,
        remedy=f"Write the same in both, or delete the one that is there{_option(key)}.",
    )


def _option(key: str) -> str:
    return f", or say it with {OPTIONS[key]}" if key in OPTIONS else ""


def _listed(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A card's tables, as far as they are any; the hub knows a single one without a list too."""
    found = data.get(CONFIGS) or []
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else [found]


def _configs(listed: list[dict[str, Any]], has_rows: bool) -> list[dict[str, Any]]:
    """The tables that a viewer offers, one of them by default: of one name the first; that of
    readable rows if they are there, before all others where nothing listed it yet."""
    named: dict[str, dict[str, Any]] = {}
    for one in listed:
        named.setdefault(str(one.get("config_name")), one)
    if not has_rows:
        named.pop(ROWS, None)
    elif ROWS not in named:
        named = {ROWS: {"config_name": ROWS, "data_files": FILE, "default": True}} | named
    default = next((n for n, one in named.items() if one.get("default")), next(iter(named), ""))
    return [
        {k: v for k, v in one.items() if k != "default"}
        | ({"default": True} if name == default else {})
        for name, one in named.items()
    ]
