"""Rows of JSON files: one object on each line, or one list of objects.

One idea: a file is read a line or an element at a time, so its size does not matter, and every row
knows its line. What is no row comes out as `Rejected`, and the next one is read.
"""

import codecs
import json
import re
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from stillroom.cache_schemas.errors import CorpusError, first_line
from stillroom.pipeline.corpus.characters import decode, whole
from stillroom.pipeline.corpus.compression import DAMAGE, open_bytes
from stillroom.pipeline.corpus.documents import Rejected, Row, first_words

BOM = codecs.BOM_UTF8
CHUNK = 1 << 16
DECODER = json.JSONDecoder()
BLANK = re.compile(r"[ \t\r\n]*")
EXPECTED = "one JSON object on each line, or one list of objects"
UNFINISHED = "Unterminated string"
"""How Python's JSON reader calls a string whose end has not been read yet."""


def read_json(path: Path) -> Iterator[Row | Rejected]:
    """Rows of a JSONL file (blank lines hold nothing) or of a file with one JSON list."""
    try:
        with open_bytes(path) as file:
            is_list = file.peek(CHUNK).removeprefix(BOM).lstrip().startswith(b"[")
            yield from _Elements(file, path) if is_list else _lines(file, path)
    except DAMAGE as error:
        found = f"cannot be read to its end ({_reason(error)})"
        yield Rejected(CorpusError(found, where=str(path), remedy="Get the file again."))


def _lines(file: BufferedReader, path: Path) -> Iterator[Row | Rejected]:
    offset = 0
    for number, line in enumerate(file, start=1):
        text = line.removeprefix(BOM) if number == 1 else line
        if text.strip():
            try:
                values = as_object(decode(text, str(path), number, offset), f"{path}:{number}")
                yield Row(f"{path}:{number}", values, path.parent)
            except CorpusError as error:
                yield Rejected(error, first_words(text))
        offset += len(line)


def as_object(text: str, where: str) -> dict[str, Any]:
    """JSON text that has to be a row.

    Raises:
        CorpusError: it is not.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        at = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        found = f"is not JSON ({getattr(error, 'msg', error)}{at})"
        raise CorpusError(found, expected=EXPECTED, where=where) from None
    return checked(value, text, where)


def checked(value: Any, text: str, where: str) -> dict[str, Any]:
    """A JSON value that has to be a row.

    Raises:
        CorpusError: it is no object, or holds half a character.
    """
    if not isinstance(value, dict):
        found = f"holds a JSON {type(value).__name__}"
        raise CorpusError(found, expected=EXPECTED, where=where)
    if "\\ud" in text or "\\uD" in text:
        whole(json.dumps(value, ensure_ascii=False), where)
    return value


class _Elements:
    """The elements of one JSON list, read as they come; a broken one ends the file."""

    def __init__(self, file: BufferedReader, path: Path):
        self._file, self._path = file, path
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._buffer, self._at, self._line, self._more = "", 0, 1, True

    def __iter__(self) -> Iterator[Row | Rejected]:
        try:
            self._skip("[")
            while self._skip(",") != "]":
                yield self._row()
        except CorpusError as error:
            yield Rejected(error, first_words(self._buffer[self._at :]))

    def _row(self) -> Row | Rejected:
        where = f"{self._path}:{self._line}"
        value, text = self._value(where)
        self._line += text.count("\n")
        try:
            return Row(where, checked(value, text, where), self._path.parent)
        except CorpusError as error:
            return Rejected(error, first_words(text))

    def _value(self, where: str) -> tuple[Any, str]:
        """The next element, and its text."""
        while True:
            try:
                value, end = DECODER.raw_decode(self._buffer, self._at)
            except (ValueError, RecursionError) as error:
                if self._broken(error) or not self._read():
                    raise CorpusError(f"is not JSON ({error})", where=where) from None
                continue
            text, self._at = self._buffer[self._at : end], end
            return value, text

    def _broken(self, error: Exception) -> bool:
        """Whether an error is one of the text, and not that more of it has to be read."""
        if not isinstance(error, json.JSONDecodeError):
            return True
        return not error.msg.startswith(UNFINISHED) and error.pos < len(self._buffer) - 16

    def _skip(self, sign: str) -> str:
        """Pass white space and one `sign`; returns the character that comes next."""
        while True:
            self._blanks()
            if self._buffer.startswith(sign, self._at):
                self._at, sign = self._at + 1, "\0"
                self._blanks()
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._read():
                found = "is not JSON (the list has no end)"
                raise CorpusError(found, where=f"{self._path}:{self._line}")

    def _blanks(self) -> None:
        blank = BLANK.match(self._buffer, self._at)
        self._line += blank[0].count("\n") if blank else 0
        self._at = blank.end() if blank else self._at

    def _read(self) -> bool:
        """Read as much again as is waiting; False at the end."""
        waiting = self._buffer[self._at :]
        data = self._file.read(max(CHUNK, len(waiting)))
        try:
            self._buffer, self._at = waiting + self._decoder.decode(data, not data), 0
        except UnicodeDecodeError as error:
            found = f"byte {error.object[error.start]:#04x} is not UTF-8"
            where = f"{self._path}, after line {self._line}"
            raise CorpusError(found, where=where, remedy="Convert the file to UTF-8.") from None
        return bool(data)


def _reason(error: BaseException) -> str:
    return first_line(error)
