"""From what a person types to a storage: a directory, or a URL of any fsspec file system.

One idea: this is the only place that looks at a location's form. It opens no cache.
"""

from pathlib import Path

from stillroom.pipeline.cache.storage.directory import DirectoryStorage
from stillroom.pipeline.cache.storage.protocol import Storage


def open_storage(root: str | Path | Storage) -> Storage:
    """Storage for a directory, a fsspec URL, or what is one already."""
    if isinstance(root, str) and "://" in root:
        if root.startswith("file://"):
            return DirectoryStorage(root.removeprefix("file://"))
        return _far(root)
    return DirectoryStorage(root) if isinstance(root, (str, Path)) else root


def _far(url: str) -> Storage:
    if url.startswith(("http://", "https://")):
        from stillroom.pipeline.cache.storage.web import WebStorage

        return WebStorage(url)
    from stillroom.pipeline.cache.storage.bucket import BucketStorage

    return BucketStorage(url)
