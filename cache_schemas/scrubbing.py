"""What may be shown or stored of a text that may hold a credential.

One idea: this is the only place that knows what a secret looks like: by its place (a URL's user or
query, `token=`), by its form (a hub's or a cloud's token, a PEM key), and by its value, where this
process holds it in its environment or was told of it. Everything that is printed or written beside
a result passes here. It finds nothing that has neither place, form nor known value.
"""

import os
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

HIDDEN = "***"
SHORTEST = 8
"""Characters of a value that is looked for by itself; a shorter one is part of too many words."""

_WORDS = (
    r"(?:key(?:[_-]?id)?|secret|token|passwd|password|pwd|passphrase|credentials?|signature|sig|"
    r"sas|authorization|cookie)"
)
_ORDINARY = (
    r"(?!(?:\w*[._])?(?:bos|eos|pad|unk|sep|cls|mask|image|video|audio|stop|end|start|next|first|last|public|"
    r"primary|foreign|sort)[._-](?:token|key))"
)
"""What tokenizers and tables call theirs."""
_WITHOUT = r"(?:[A-Za-z0-9]*(?:api|access|secret|private|account))?"
_NAME = rf"{_ORDINARY}(?:[A-Za-z0-9]+[._-])*{_WITHOUT}{_WORDS}"
_IS_SECRET = re.compile(rf"(?i){_NAME}|auth|accesskey(?:id)?|secretkey")
"""Names whose last word says that the value is secret: `hf_token`, `AWS_SECRET_ACCESS_KEY`."""

_PLACES = (
    # A password may hold slashes, so the user's part ends at the last @ before a space.
    (re.compile(r"://[^\s/@:'\"]*:[^\s'\"]*@"), f"://{HIDDEN}@"),
    (re.compile(r"://[^\s/@'\"]+@"), f"://{HIDDEN}@"),
    (re.compile(r"(://[^\s?#'\"]+[?#])[^\s'\"]+"), rf"\1{HIDDEN}"),
    (
        re.compile(r"(?i)\b(authorization|cookie)(['\"]?\s*[=:]\s*['\"]?)[^'\"\r\n]+"),
        rf"\1\2{HIDDEN}",
    ),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{16,}"), rf"\1 {HIDDEN}"),
    (re.compile(rf"(?i)(?<![\w.-])({_NAME})(=['\"]?)[^\s,&;)}}'\"\]]+"), rf"\1\2{HIDDEN}"),
    (
        re.compile(rf"(?i)(['\"]{_NAME}['\"]\s*:\s*)(?:\"[^\"]*\"|'[^']*'|[^\s,&;)}}\]]+)"),
        rf"\1'{HIDDEN}'",
    ),
    (re.compile(rf"(?i)\b(x-[a-z-]*{_WORDS})(:\s*)\S+"), rf"\1\2{HIDDEN}"),
)
_FORMS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.*?-----END [A-Z ]*PRIVATE KEY-----|.*)"
    r"|\b(?:hf_[A-Za-z0-9]{20,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}"
    r"|gh[opsur]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|sk-[\w-]{20,}|xox[abeprs]-[\w-]{10,}"
    r"|AIza[\w-]{30,}|ya29\.[\w-]{16,}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)",
    re.DOTALL,
)
_told: set[str] = set()


def scrub(text: str) -> str:
    """A text in which every credential is `***`; a URL keeps its host and path."""
    for pattern, replacement in _PLACES:
        text = pattern.sub(replacement, text)
    text = _FORMS.sub(HIDDEN, text)
    known = _held(frozenset(os.environ.items())) | _told
    for value in sorted((value for value in known if value in text), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return text


def scrubbed(value: Any) -> Any:
    """JSON in which every credential is `***`, by its key's name too."""
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, Mapping):
        return {key: _entry(key, inner) for key, inner in value.items()}
    return [scrubbed(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def remember(url: str) -> None:
    """Look for a URL's own secrets by value from now on: libraries quote them in other places."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return
    held = [value for _, value in parse_qsl(parts.query)]
    user = user_of(url)
    held += [user, user.partition(":")[2]]
    held += [unquote(value) for value in held]
    _told.update(value for value in held if len(value) >= SHORTEST)


def user_of(url: str) -> str:
    """Name and password before the host of a URL, which may hold slashes; empty: none."""
    user, found, _ = url.partition("://")[2].rpartition("@")
    return user if found and (":" in user.split("/")[0] or "/" not in user) else ""


def _entry(key: Any, value: Any) -> Any:
    is_secret = isinstance(value, str) and value and _IS_SECRET.fullmatch(str(key))
    return HIDDEN if is_secret else scrubbed(value)


@lru_cache(1)
def _held(environment: frozenset[tuple[str, str]]) -> frozenset[str]:
    """Values of the environment whose names say that they are secret; a path is none."""
    return frozenset(
        value
        for name, value in environment
        if len(value) >= SHORTEST and _IS_SECRET.fullmatch(name) and not value.startswith("/")
    )
