"""What may be shown of a location or of an error about it.

One idea: this is the only place that knows what a credential looks like.
"""

import re

_SECRETS = (
    (re.compile(r"://[^/@\s]+@"), "://"),
    (re.compile(r"(://[^\s?#'\"]+)[?#][^\s'\"]*"), r"\1"),
    (
        re.compile(r"(?i)\b(key|secret|token|password|signature)(\w*['\"]?\s*[=:]\s*)[^\s,&)}]+"),
        r"\1\2***",
    ),
)


def scrub(text: str) -> str:
    """A text without user names, query strings and whatever looks like a credential."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text
