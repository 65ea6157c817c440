"""From what a person types to a storage: a directory, or a URL of any fsspec file system.

One idea: this is the only place that looks at a location's form, and the only one that decides what
of it may be shown. It opens no cache.
"""

import re
from pathlib import Path

from pipeline.cache.storage import DirectoryStorage, Storage

_SECRETS = (
    (re.compile(r"://[^/@\s]+@"), "://"),
    (re.compile(r"(://[^\s?#'\"]+)[?#][^\s'\"]*"), r"\1"),
    (
        re.compile(r"(?i)\b(key|secret|token|password|signature)(\w*['\"]?\s*[=:]\s*)[^\s,&)}]+"),
        r"\1\2***",
    ),
)


def open_storage(root: str | Path | Storage) -> Storage:
    """Storage for a directory, a fsspec URL, or what is one already."""
    if isinstance(root, str) and "://" in root:
        if root.startswith("file://"):
            return DirectoryStorage(root.removeprefix("file://"))
        from pipeline.cache.bucket import BucketStorage

        return BucketStorage(root)
    return DirectoryStorage(root) if isinstance(root, (str, Path)) else root


def scrub(text: str) -> str:
    """A text without user names, query strings and whatever looks like a credential."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text
