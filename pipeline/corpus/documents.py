"""Documents, and sources of them that are found but not yet read: two values.

One idea: whatever a source is, the corpus sees a generator of `Document`s in a fixed order.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Document:
    """One text or one conversation.

    Attributes:
        where: file and line, row or topic, for messages.
        text: plain text; empty for a conversation.
        messages: chat messages as the template takes them; empty for plain text.
        images: bytes of the image files that the messages show, in order.
    """

    where: str
    text: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    images: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class OpenSource:
    """A source whose bytes are known but not yet read.

    Attributes:
        facts: what was found: name, kind, number of files, sha256 over their bytes.
        documents: call it to read them from the start.
    """

    facts: dict[str, Any]
    documents: Callable[[], Iterator[Document]] = field(compare=False)
