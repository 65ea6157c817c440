"""Documents, rows that are none, and sources of them that are found but not yet read: values.

One idea: whatever a source is, the corpus sees a generator of `Document`s in a fixed order, and in
their places the rows that cannot be used.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stillroom.cache_schemas.errors import CorpusError

WORDS = 80
"""Characters of a bad row that are shown."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text or one conversation.

    Attributes:
        where: file and line, row or topic, for messages.
        text: plain text; empty for a conversation.
        messages: chat messages as the template takes them; empty for plain text.
        images: bytes of the image files that the messages show, in order.
        context: what else the chat template gets: `tools`, `documents`, arguments of this row.
    """

    where: str
    text: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    images: tuple[bytes, ...] = ()
    context: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file, before anybody knows what its columns mean.

    Attributes:
        where: file and line or row, for messages.
        values: column -> value.
        folder: where the file is; paths in it begin there.
        arrow: nulls may be Arrow's, which gives all structs of a column the same fields.
    """

    where: str
    values: dict[str, Any]
    folder: Path
    arrow: bool = False


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row, or the rest of a file, that cannot be used.

    Attributes:
        error: what is wrong, and where.
        words: how the row begins.
    """

    error: CorpusError
    words: str = ""


@dataclass(frozen=True, slots=True)
class OpenSource:
    """A source whose bytes are known but not yet read.

    Attributes:
        facts: what was found: name, kind, number of files, sha256 over their bytes, format.
        read: call it to read them from the start.
        aside: columns that hold something and are not read; told, and no part of the facts.
    """

    facts: dict[str, Any]
    read: Callable[[], Iterator[Document | Rejected]] = field(compare=False)
    aside: tuple[str, ...] = field(default=(), compare=False)

    @property
    def words(self) -> str:
        """What it is taken for, and what of it is not read."""
        names = ", ".join(f'"{name}"' for name in self.aside)
        not_read = f"; not read: {names}" if names else ""
        return f"{self.facts['format']} ({self.facts['name']}){not_read}"

    def documents(self) -> Iterator[Document]:
        """The documents of a source in which every row has to be one.

        Raises:
            CorpusError: a row cannot be used.
        """
        for document in self.read():
            if isinstance(document, Rejected):
                raise document.error
            yield document


def first_words(value: Any) -> str:
    """How a row, a conversation or a line begins."""
    if isinstance(value, bytes):
        return value[:WORDS].decode("utf-8", "replace")
    if isinstance(value, (dict, list, tuple)):
        inner = value.values() if isinstance(value, dict) else value
        return next((words for one in inner if (words := first_words(one))), "")
    text = " ".join(value[: 2 * WORDS].split()) if isinstance(value, str) else ""
    return text.encode("utf-8", "replace").decode()[:WORDS]
