"""Strict tables: pydantic models that refuse what they do not know and name the nearest key.

One idea: a misspelt key, option or value is found before any work is done, with one sentence that
says where it is and what was probably meant. This module knows no table of its own.
"""

import difflib
import os
import re
from collections.abc import Iterable
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from stillroom.cache_schemas.errors import ConfigError


def _expanded(path: str) -> str:
    """`~` and `$VARIABLES` as the shell would read them."""
    expanded = os.path.expandvars(os.path.expanduser(path))
    if left := re.search(r"\$(\w+|\{\w+\})", expanded):
        raise ValueError(f"the environment has no variable {left[0]}")
    return expanded


PathText = Annotated[
    str, AfterValidator(_expanded), WithJsonSchema({"type": "string", "format": "path"})
]
"""A path, URL or hub id in a run file."""


def a_number(given: Any) -> Any:
    """TOML tells numbers from text: what pydantic would turn into one was meant otherwise."""
    if isinstance(given, bool | str):
        raise ValueError("expected a number, without quotes, and not true or false")
    return given


class Table(BaseModel):
    """A TOML table: immutable, and closed to unknown keys and to numbers that are none."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    # Not pydantic's own strictness: that also refuses lists for tuples, and TOML has only lists.
    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, given: Any, info: ValidationInfo) -> Any:
        is_number = cls.model_fields[info.field_name or ""].annotation in (int, float)
        return a_number(given) if is_number else given


SPELT_OUT = {"bs": "batch_size"}
"""What the field writes short for names that are not ours."""

IN_TOML = {
    "tuple_type": "expected a list ([...], or of tables [[...]])",
    "dict_type": "expected a table",
    "model_type": "expected a table",
    "model_attributes_type": "expected a table",
    "string_type": "expected text in quotes",
    "bool_type": "expected true or false",
}
"""What pydantic calls by Python's names, in TOML's."""

T = TypeVar("T", bound=Table)


def validate(model: type[T], data: Any, where: str) -> T:
    """Build a table from plain data.

    Raises:
        ConfigError: a key is unknown or missing, or a value is not allowed; `where` is named.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _explain(model, error, where) from None


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint naming the known word that `word` is short for (`lr`, `seq_len`), or looks most like;
    empty when nothing is known."""
    words = list(known)
    near = [one for one in words if _short_for(word, one)]
    near = near or difflib.get_close_matches(SPELT_OUT.get(word, word), words, n=1, cutoff=0.0)
    return f"Did you mean '{near[0]}'?" if near else ""


def _short_for(word: str, known: str) -> bool:
    """Whether a word is made of the beginnings of another's several parts, in order."""
    parts = re.split(r"[_\- ]", known.lower())
    left = {re.sub(r"[_\- ]", "", word.lower())}  # what no part has taken yet
    for part in parts:
        left = {
            rest[size:]
            for rest in left
            for size in range(1, len(part) + 1)
            if part[:size] == rest[:size] and len(rest) >= size
        }
    return len(parts) > 1 and "" in left


def _explain(model: type[Table], error: ValidationError, where: str) -> ConfigError:
    """The first problem, in words, with the nearest known key for a misspelt one."""
    # A misspelt key is also a missing one; the misspelling is the mistake.
    problems = error.errors(include_url=False)
    first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        hint = nearest(str(first["loc"][-1]), _known_keys(model, first["loc"][:-1]))
        return ConfigError(f"unknown key '{key}'", where=where, remedy=hint)
    if first["type"] == "missing" and isinstance(first["loc"][-1], int):
        key, _, number = key.rpartition(".")
        return ConfigError(f"'{key}': expected more than {number} values", where=where)
    if first["type"] == "missing":
        return ConfigError(f"key '{key}' is missing", where=where)
    said = IN_TOML.get(first["type"], first["msg"].removeprefix("Value error, "))
    given = first["input"]
    # Of a whole table the message itself names what is wrong in it.
    found = "" if isinstance(given, dict | Table) else f" (found {given!r})"
    return ConfigError((f"'{key}': " if key else "") + said + found, where=where)


def _known_keys(root: type[Table], location: tuple) -> list[str]:
    """Keys of the table at a location in the document."""
    model: Any = root
    for part in location:
        if isinstance(part, str):
            model = _inner_model(model.model_fields[part].annotation)
    return list(model.model_fields)


def _inner_model(annotation: Any) -> Any:
    """The Table class inside `Table | None` or `tuple[Table, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, Table):
        return annotation
    inner = (_inner_model(a) for a in getattr(annotation, "__args__", ()))
    return next((model for model in inner if model is not None), None)
