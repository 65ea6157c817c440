"""JSON documents that carry their own digest and may come from a stranger.

One idea: a document is a JSON object whose `digest` is the sha256 of the canonical form of
everything else in it, so a changed value is found whatever the file's layout. Canonical form: keys
sorted, no spaces, ASCII, no NaN. Parsing is bounded in size and depth and refuses repeated keys.
It knows nothing about caches.
"""

import hashlib
import json
import re
from typing import Any, NoReturn

from stillroom.cache_schemas.errors import ShardCorrupt

MAX_BYTES = 1 << 28
MAX_DEPTH = 24
DIGEST = "digest"
_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]')


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
    named = document.pop(DIGEST)
    if digest(document) != named:
        _refuse("has been changed: its digest does not fit its content", where)
    return document


def parse(data: bytes, where: str) -> Any:
    """Bounded JSON parsing.

    Raises:
        ShardCorrupt: too large, too deep, not JSON, a repeated key, NaN or infinity.
    """
    if len(data) > MAX_BYTES:
        _refuse(f"has {len(data)} bytes", where, f"at most {MAX_BYTES}")
    if _depth(data) > MAX_DEPTH:
        _refuse("is nested too deeply", where, f"at most {MAX_DEPTH} levels")
    try:
        return json.loads(data, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        _refuse(f"is not JSON ({str(error)[:120]})", where)


def _depth(data: bytes) -> int:
    depth = deepest = 0
    for found in _BRACKETS.finditer(data):
        first = found[0][:1]
        depth += (first in b"[{") - (first in b"]}")
        deepest = max(deepest, depth)
    return deepest


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key is repeated")
    return made


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _refuse(found: str, where: str, expected: str = "") -> NoReturn:
    remedy = "Get the file again, or run `stillroom cache repair` where the cache was made."
    raise ShardCorrupt(found, expected=expected, where=where, remedy=remedy)
