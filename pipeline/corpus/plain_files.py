"""Files that are a document as they are: texts, captioned pictures, Python's own help.

One idea: no columns and no formats; one file or topic is one document.
"""

from collections.abc import Iterator
from pathlib import Path

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.corpus.characters import decode
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
    except OSError as error:
        yield Rejected(CorpusError(f"cannot be read ({error.strerror})", where=str(path)))


def read_topics() -> Iterator[Document]:
    """Python's own language reference, one help topic a document (about 465 kB of English)."""
    import pydoc_data.topics

    for name in sorted(pydoc_data.topics.topics):
        yield Document(f"pydoc_data.topics['{name}']", pydoc_data.topics.topics[name])
