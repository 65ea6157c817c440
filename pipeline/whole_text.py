"""A small text that appears in its file at once.

One idea: it is written beside the file and takes its name, so that a reader never sees half of it
and several writers leave one whole text. What must outlive a power failure is not written here.
"""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Replace a file, or make it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)
