"""How two nested tables of facts differ, in sentences.

One idea: a fact that only one side records at all is one difference, however much is in it; so a
plan of an earlier release says which facts are new. It judges nothing.
"""

from collections.abc import Iterator, Mapping
from typing import Any

LONGEST = 160
"""Letters of a value in a sentence."""


def differences(mine: Mapping, theirs: Mapping) -> list[str]:
    """One sentence per fact of two nested tables that differs; see `Plan.differences`."""
    return sorted(_differences(mine, theirs, ""))


def _differences(mine: Mapping, theirs: Mapping, prefix: str) -> Iterator[str]:
    for key in mine.keys() | theirs.keys():
        name = f"{prefix}{key}"
        if key not in theirs:
            yield f"{name}: not recorded there, expected {_shown(mine[key])}"
        elif key not in mine:
            yield f"{name}: found {_shown(theirs[key])}, not recorded here"
        elif isinstance(mine[key], Mapping) and isinstance(theirs[key], Mapping):
            yield from _differences(mine[key], theirs[key], f"{name}.")
        elif mine[key] != theirs[key]:
            yield f"{name}: found {_shown(theirs[key])}, expected {_shown(mine[key])}"


def _shown(value: Any) -> str:
    """A value in a sentence; a table by its number of keys."""
    if isinstance(value, Mapping):
        return f"a table of {len(value)} keys"
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
