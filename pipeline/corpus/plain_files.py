"""Files that are a document as they are: texts, captioned pictures, Python's own help.

One idea: no columns and no formats; one file or topic is one document.
"""

from collections.abc import Iterator
from pathlib import Path

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.corpus.compression import DAMAGE, open_bytes
from stillroom.pipeline.corpus.documents import Document, Rejected, first_words
from stillroom.pipeline.corpus.images import caption_messages, read_caption


def read_text(path: Path) -> Iterator[Document | Rejected]:
    """A text file is one document; it must be UTF-8."""
    data = b""
    try:
        with open_bytes(path) as file:
            data = file.read()
        yield Document(str(path), decode(data, str(path)).removeprefix("\ufeff"))
    except CorpusError as error:
        yield Rejected(error, first_words(data))
    except DAMAGE as error:
        yield Rejected(CorpusError(f"cannot be read ({error})", where=str(path)))


def read_captioned(path: Path) -> Iterator[Document | Rejected]:
    """An image file and the caption beside it as a conversation of two turns."""
    try:
        messages = caption_messages(read_caption(path))
        yield Document(str(path), messages=messages, images=(path.read_bytes(),))
    except CorpusError as error:
        yield Rejected(error)


def read_topics() -> Iterator[Document]:
    """Python's own language reference, one help topic a document (about 465 kB of English)."""
    import pydoc_data.topics

    for name in sorted(pydoc_data.topics.topics):
        yield Document(f"pydoc_data.topics['{name}']", pydoc_data.topics.topics[name])


def decode(data: bytes, file: str, line: int = 1, offset: int = 0) -> str:
    """Bytes of a file from a line and byte offset on, as text; names both of the first bad byte.

    Raises:
        CorpusError: they are not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise CorpusError(
            f"byte {data[error.start]:#04x} at byte offset {offset + error.start} is not UTF-8",
            where=f"{file}:{line}",
            remedy="Convert the file to UTF-8 (for example with iconv).",
        ) from None
