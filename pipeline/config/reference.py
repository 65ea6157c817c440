"""The reference of run files: every table and key, written from the models themselves.

One idea: a key's type, bounds, default and meaning are said once, where the key is declared; the
JSON schema that pydantic makes of it is what editors read, and this module turns the same schema
into a page. It knows no key by name, and no objective: their options are given to it.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from stillroom.pipeline.config.strict import Table

Schema = dict[str, Any]


def page(root: type[Table], more: Mapping[str, type[Table]]) -> str:
    """Markdown of all tables.

    Args:
        root: the model of a whole file.
        more: heading -> a model whose place in the file is `options`.
    """
    parts = [section(title, schema) for title, schema in tables(root.model_json_schema())]
    for title, model in more.items():
        parts.append(section(title, model.model_json_schema(), says_nothing="No options."))
    return "\n".join(parts)


def tables(schema: Schema) -> Iterator[tuple[str, Schema]]:
    """(heading, schema) of a table and all below it, in the order of their declaration."""
    return _below(schema, "", schema.get("$defs", {}))


def _below(schema: Schema, path: str, defs: Schema) -> Iterator[tuple[str, Schema]]:
    yield f"`{path}`" if path else "Top of the file", schema
    for name, key in schema.get("properties", {}).items():
        for wrapped, inner in _inner(key, defs):
            below = f"{path.strip('[]')}.{name}".strip(".")
            yield from _below(inner, wrapped.format(below), defs)


def section(title: str, schema: Schema, says_nothing: str = "") -> str:
    """One table of the page: its meaning, then a line for every key that holds a value."""
    lines = [f"## {title}", "", *_flat(schema.get("description", "")), ""]
    keys = {n: k for n, k in schema.get("properties", {}).items() if not _is_table(k)}
    if not keys:
        return "\n".join([*lines[:-1], *([says_nothing, ""] if says_nothing else [])])
    needed = schema.get("required", [])
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    lines += [_row(name, key, name in needed) for name, key in keys.items()]
    return "\n".join([*lines, ""])


def _row(name: str, key: Schema, needed: bool) -> str:
    given = key.get("default", {} if key.get("type") == "object" else None)
    default = "*needed*" if needed else f"`{_toml(given)}`"
    meaning = " ".join(_flat(key.get("description", "")))
    return f"| `{name}` | {_kind(key)} | {default} | {_escaped(meaning)} |"


def _inner(key: Schema, defs: Schema) -> Iterator[tuple[str, Schema]]:
    """The tables that a key holds, each with how its heading is written."""
    if "$ref" in key:
        yield "[{}]", defs[key["$ref"].rsplit("/", 1)[1]]
    for choice in key.get("anyOf", ()):
        yield from _inner(choice, defs)
    if "$ref" in key.get("items", {}):
        yield "[[{}]]", defs[key["items"]["$ref"].rsplit("/", 1)[1]]
    if isinstance(more := key.get("additionalProperties"), dict) and "$ref" in more:
        yield "[{}.NAME]", defs[more["$ref"].rsplit("/", 1)[1]]


def _is_table(key: Schema) -> bool:
    held = (key, *key.get("anyOf", ()), key.get("items", {}), key.get("additionalProperties"))
    return any(isinstance(part, dict) and "$ref" in part for part in held)


def _kind(key: Schema) -> str:
    """Type and bounds in words."""
    if "anyOf" in key:
        return " or ".join(_kind(part) for part in key["anyOf"] if part.get("type") != "null")
    if "enum" in key or "const" in key:
        return " ".join(f"`{_toml(value)}`" for value in key.get("enum", [key.get("const")]))
    if key.get("type") == "array":
        return f"list of {_kind(key.get('items', {}))}".removesuffix(" of any")
    if key.get("type") == "object":
        return "table"
    if key.get("format") == "path":
        return "path, URL or hub id"
    return f"{key.get('type', 'any')}{_bounds(key)}"


def _bounds(key: Schema) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    said = [f"{sign} {key[name]}" for name, sign in signs.items() if name in key]
    return f" {', '.join(said)}" if said else ""


def _toml(value: Any) -> str:
    """A value as a run file writes it; nothing where a key is simply left out."""
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(part) for part in value)}]"
    return str(value)


def _flat(text: str) -> list[str]:
    return [" ".join(text.split())] if text else []


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
