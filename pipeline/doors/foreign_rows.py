"""Rows of somebody else's files, and whether they have the shape that their format says.

One idea: files are read by the readers of a corpus (compressed or not, damaged or not), and a value
of another kind than the format's is refused with its file, row and place before anything is made
of it. What rows mean is known by the readers of each format.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stillroom.cache_schemas.errors import CacheError
from stillroom.pipeline.corpus.compression import plain_name
from stillroom.pipeline.corpus.documents import Rejected, Row
from stillroom.pipeline.corpus.json_rows import read_json
from stillroom.pipeline.corpus.table_rows import read_parquet

NOTHING = "Nothing was written. Mend or leave out this row"
KINDS: dict[str, Callable[[Path], Iterator[Row | Rejected]]] = {
    "jsonl": read_json,
    "parquet": read_parquet,
}
LARGEST_ID = 2**31 - 1
"""A cache holds int32."""


class Shape(BaseModel):
    """A JSON object of a format; keys that it does not name may be there."""

    model_config = ConfigDict(extra="ignore", frozen=True)


Shaped = TypeVar("Shaped", bound=Shape)
Id = Annotated[int, Field(strict=True, ge=0, le=LARGEST_ID)]
Key = Annotated[int, Field(ge=0, le=LARGEST_ID)]
"""An id as the name of a value, which JSON has as text."""
Nats = Annotated[float, Field(strict=True)]


def wrong(where: str, found: str, expected: str = "", remedy: str = "") -> CacheError:
    """What a source is refused with."""
    return CacheError(found, expected=expected, where=where, remedy=remedy or f"{NOTHING}.")


def rows_of(source: Path, kind: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows of a file, or of every file of a directory by numbers and names, and where each stands.

    Args:
        source: file or directory.
        kind: a key of `KINDS`.

    Raises:
        CacheError: there are no files, or one cannot be read to its end.
    """
    for path in _files(source, kind):
        for row in KINDS[kind](path):
            if isinstance(row, Rejected):
                found = row.error
                remedy = f"Nothing was written. {found.remedy}" if found.remedy else ""
                raise wrong(found.where, found.found, found.expected, remedy)
            yield row.values, row.where


def _files(source: Path, kind: str) -> list[Path]:
    if source.is_file():
        return [source]
    inside = source.glob("*") if source.is_dir() else ()
    named = [one for one in inside if plain_name(one).endswith(f".{kind}") and one.is_file()]
    files = sorted((one for one in named if not one.name.startswith(".")), key=_number)
    if not files:
        found = f"no {kind} file" if source.exists() else "no such file or directory"
        raise CacheError(found, where=str(source), remedy="Check the path.")
    return files


def _number(path: Path) -> tuple[int, str]:
    digits = "".join(c for c in path.stem if c in "0123456789")
    return int(digits[:18] or 0), path.name


def shaped(shape: type[Shaped], row: dict[str, Any], where: str) -> Shaped:
    """A row as its format has it.

    Raises:
        CacheError: a key is missing or a value is of another kind; the first of them.
    """
    try:
        return shape.model_validate(row)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            beside = ", ".join(map(str, row)) if len(first["loc"]) == 1 else ""
            raise wrong(where, f"no {key}", f"{key} beside {beside}" if beside else "") from None
        found = str(first["input"])[:40]
        raise wrong(where, f"{key} is {found!r}", first["msg"].lower()) from None


def integers(value: Any, name: str, where: str, axes: int = 1) -> np.ndarray:
    """int64 array of a column's lists.

    Raises:
        CacheError: they hold something else, or lists of different lengths.
    """
    found = _array(value, name, where, axes)
    if found.size and (found.dtype.kind not in "iu" or _beyond(found)):
        odd = _first(value, lambda one: type(one) is not int or abs(one) > LARGEST_ID)
        raise wrong(where, f"{name} holds {odd}", "whole numbers of 31 bits")
    return found.astype(np.int64)


def numbers(value: Any, name: str, where: str, axes: int = 1) -> np.ndarray:
    """float64 array of a column's lists.

    Raises:
        CacheError: as `integers`.
    """
    found = _array(value, name, where, axes)
    if found.size and found.dtype.kind not in "fiu":
        odd = _first(value, lambda one: type(one) not in (int, float))
        raise wrong(where, f"{name} holds {odd}", "numbers")
    return found.astype(np.float64)


def _array(value: Any, name: str, where: str, axes: int) -> np.ndarray:
    try:
        found = np.asarray(value)
    except ValueError:  # lists of different lengths
        raise wrong(where, f"{name} has rows of different sizes", "one size") from None
    if found.size == 0 and isinstance(value, list):
        return np.empty((len(value) if axes > 1 else 0, *[0] * (axes - 1)))
    if found.ndim != axes:
        raise wrong(where, f"{name} is {str(value)[:40]!r}", "a list" if axes == 1 else "rows")
    return found


def _beyond(found: np.ndarray) -> bool:
    return int(found.max()) > LARGEST_ID or int(found.min()) < -LARGEST_ID


def _first(value: Any, odd: Callable[[Any], bool]) -> str:
    """The first of nested lists that is odd, for a message."""
    flat = [one for row in value for one in (row if isinstance(row, list) else [row])]
    return repr(next(filter(odd, flat), flat[0]))[:40]
