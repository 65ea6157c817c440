"""Texts as whole characters: bytes that have to be UTF-8, and halves of characters.

One idea: what no tokenizer takes is refused with its place, wherever a text comes from. Where rows
come from, and what is in them, is not known here.
"""

from stillroom.cache_schemas.errors import CorpusError


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


def whole(text: str, where: str = "") -> str:
    """A text without lone surrogates: halves of characters, which no tokenizer takes.

    Raises:
        CorpusError: there is one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise CorpusError(
            f"holds half of a character (\\u{ord(half):04x})",
            expected="whole Unicode characters",
            where=where,
            remedy="Write the text again with a tool that keeps surrogate pairs together.",
        ) from None
    return text
