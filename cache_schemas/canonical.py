"""JSON documents that carry their own digest and may come from a stranger.

One idea: a document is a JSON object whose `digest` is the sha256 of the canonical form of
everything else in it, so a changed value is found whatever the file's layout. Canonical form: keys
sorted, no spaces, ASCII, no NaN. Parsing is bounded in size and depth and refuses repeated keys.
It knows nothing about caches.
"""

import hashlib
import json
import math
from typing import Any, NoReturn

from stillroom.cache_schemas.errors import ShardCorrupt

MAX_BYTES = 1 << 25
"""Of a document: a receipt of 65,536 examples, a manifest of 262,144 shards. A quarter of it where
it is not ASCII, which takes four times the memory."""
MAX_DEPTH = 24
MAX_TEXTS, MAX_VALUES, MAX_CONTAINERS = 1 << 20, 1 << 21, 1 << 16
"""Strings, values, and lists and objects of a document: what is small in a file may be large in
memory (an empty list is two bytes there and 64 here)."""
DIGEST = "digest"


def digest(value: Any) -> str:
    """Hex sha256 of the canonical form of a JSON value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def sign(body: dict[str, Any], indent: int | None = None) -> bytes:
    """Bytes of a document: `body` and its digest."""
    document = {**body, DIGEST: digest(body)}
    separators = (",", ": ") if indent else (",", ":")
    text = json.dumps(document, sort_keys=True, indent=indent, separators=separators)
    return text.encode("ascii") + b"\n"


def check(data: bytes, where: str) -> dict[str, Any]:
    """The body of a document, without its digest.

    Raises:
        ShardCorrupt: not JSON, too large or deep, or the digest does not fit.
    """
    document = parse(data, where)
    if not isinstance(document, dict) or not isinstance(document.get(DIGEST), str):
        _refuse("is not a document with a digest", where)
    if document.pop(DIGEST) != digest(document):
        _refuse("has been changed: its digest does not fit its content", where)
    return document


def parse(data: bytes, where: str) -> Any:
    """Bounded JSON parsing.

    Raises:
        ShardCorrupt: too large, too deep, not JSON, a repeated key, NaN or infinity.
    """
    most = MAX_BYTES if data.isascii() else MAX_BYTES // 4
    if len(data) > most:
        _refuse(f"has {len(data):,} bytes", where, f"at most {most:,}")
    _check_outline(data, where)
    try:
        return json.loads(
            str(data, "utf-8"),
            object_pairs_hook=_once,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        _refuse(f"is not JSON ({str(error)[:120]})", where)


def _check_outline(data: bytes, where: str) -> None:
    """Refuse what would be large or deep, by looking at the text alone."""
    bare = data.replace(b"\\\\", b"").replace(b'\\"', b"")  # no escaped quotes
    if bare.count(b'"') > 2 * MAX_TEXTS:
        _refuse(f"has more than {MAX_TEXTS:,} texts", where)
    outside = b"".join(bare.split(b'"')[::2])  # what is not within quotes
    opened = outside.count(b"[") + outside.count(b"{")
    if opened > MAX_CONTAINERS or outside.count(b",") > MAX_VALUES:
        expected = f"at most {MAX_CONTAINERS:,} lists and objects, {MAX_VALUES:,} values"
        _refuse(f"has {opened:,} lists and objects", where, expected)
    brackets = outside.translate(None, _NO_BRACKETS)
    if len(brackets) > 2 * opened or _depth(brackets) > MAX_DEPTH:
        _refuse("is nested too deeply", where, f"at most {MAX_DEPTH} levels")


_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def _depth(brackets: bytes) -> int:
    depth = deepest = 0
    for bracket in brackets:
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key is repeated")
    return made


def _finite(text: str) -> float:
    """`1e999` would be read as infinity."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _refuse(found: str, where: str, expected: str = "") -> NoReturn:
    remedy = "Get the file again, or run `stillroom cache repair` where the cache was made."
    raise ShardCorrupt(found, expected=expected, where=where, remedy=remedy)
