"""Files and Python's own help text, read as documents.

One idea: every source is a generator of `Document`s in a fixed order, and every complaint names the
file and the line. Sources do not tokenise and never skip anything silently.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.config import Source
from stillroom.pipeline.config.strict import nearest
from stillroom.pipeline.corpus.documents import Document, OpenSource
from stillroom.pipeline.corpus.images import inline_images, read_caption, read_images
from stillroom.pipeline.images import SUFFIXES as SUFFIXES_OF_IMAGES

SUFFIXES = {
    "text": (".txt", ".md", ".rst"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet",),
    "images": SUFFIXES_OF_IMAGES,
}
ROWS_PER_READ = 1024


def read_text(path: Path) -> Iterator[Document]:
    """A text file is one document; it must be UTF-8."""
    # A byte order mark is no text.
    yield Document(str(path), decode(path.read_bytes(), str(path)).removeprefix("\ufeff"))


def read_jsonl(source: Source, path: Path) -> Iterator[Document]:
    """One JSON object a line; blank lines are allowed and hold nothing."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            if line.strip():
                row = _json_object(decode(line, str(path), number, offset), where)
                yield _document(source, row, where, path.parent)
            offset += len(line)


def read_parquet(source: Source, path: Path) -> Iterator[Document]:
    """The columns that are needed, a batch of rows at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [source.messages_column or source.text_column]
    columns += [source.image_column] if source.image_column else []
    try:
        file = pq.ParquetFile(path)
        for column in columns:
            _require_column(column, file.schema_arrow.names, str(path))
        number = 0
        for batch in file.iter_batches(ROWS_PER_READ, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield _document(source, row, f"{path} row {number}", path.parent)
    except pa.ArrowInvalid as error:
        raise CorpusError(f"is not Parquet ({_first_line(error)})", where=str(path)) from None


def read_captioned(path: Path) -> Iterator[Document]:
    """An image file and the caption beside it as a conversation of two turns."""
    messages = (
        {"role": "user", "content": ""},
        {"role": "assistant", "content": read_caption(path)},
    )
    yield Document(str(path), messages=messages, images=(path.read_bytes(),))


def read_topics() -> Iterator[Document]:
    """Python's own language reference, one help topic a document (about 465 kB of English)."""
    import pydoc_data.topics

    for name in sorted(pydoc_data.topics.topics):
        yield Document(f"pydoc_data.topics['{name}']", pydoc_data.topics.topics[name])


def find_files(path: str, suffixes: tuple[str, ...]) -> list[Path]:
    """Files named by a path, a glob or a directory, in name order.

    Raises:
        CorpusError: there are none.
    """
    given = Path(path).expanduser()
    if not path:
        raise CorpusError("a source of files needs a path", where="[[prepare.source]] path")
    if given.is_file():
        return [given]
    if given.is_dir():
        found = [p for p in given.rglob("*") if p.suffix.lower() in suffixes and p.is_file()]
    else:
        anchor = Path(given.anchor)
        found = [p for p in anchor.glob(str(given.relative_to(anchor))) if p.is_file()]
    if not found:
        raise CorpusError(
            "no such file, or nothing in it",
            where=path,
            expected=f"a file, a glob, or a directory with {', '.join(suffixes)}",
            remedy="Check [[prepare.source]] path.",
        )
    return sorted(found)


def files_source(source: Source, kind: str, files: list[Path], **more: str) -> OpenSource:
    """A source over files that have been found; `more` is added to its facts."""
    facts = {"name": source.name, "kind": source.kind, "files": len(files)}
    facts |= {"sha256": _sha256_of(files)} | more
    return OpenSource(facts, partial(_read_all, READERS[kind], source, files))


READERS: dict[str, Callable[[Source, Path], Iterator[Document]]] = {
    "text": lambda _, path: read_text(path),
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "images": lambda _, path: read_captioned(path),
}


def _read_all(reader, source: Source, files: list[Path]) -> Iterator[Document]:
    for path in files:
        yield from reader(source, path)


def _document(source: Source, row: dict[str, Any], where: str, folder: Path) -> Document:
    """The configured column of a row, checked to be text or messages; images it names."""
    column = source.messages_column or source.text_column
    _require_column(column, list(row), where)
    value = row[column]
    if source.messages_column:
        return _with_images(
            source, Document(where, messages=_messages(value, column, where)), row, folder
        )
    if value is None or isinstance(value, str):
        return Document(where, text=value or "")
    raise CorpusError(
        f"column '{column}' holds {type(value).__name__}",
        expected="text",
        where=where,
        remedy="For chats set messages_column instead of text_column.",
    )


def _with_images(source: Source, document: Document, row: dict[str, Any], folder: Path) -> Document:
    """The document with its images: those of the image column, or those its messages carry."""
    if source.image_column:
        _require_column(source.image_column, list(row), document.where)
        found = row[source.image_column]
    else:
        found = inline_images(document.messages)
    return replace(document, images=read_images(found, folder, document.where))


def _messages(value: Any, column: str, where: str) -> tuple[dict[str, Any], ...]:
    good = isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in value
    )
    if value is not None and not good:
        raise CorpusError(
            f"column '{column}' is not a list of chat messages",
            expected='[{"role": "user", "content": "..."}, ...]',
            where=where,
        )
    return tuple(value or ())


def _require_column(column: str, known: list[str], where: str) -> None:
    if column not in known:
        raise CorpusError(
            f"no column '{column}'",
            expected=f"one of {', '.join(sorted(known)) or 'none'}",
            where=where,
            remedy=nearest(column, known),
        )


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"is not JSON ({error})", where=where) from None
    if not isinstance(row, dict):
        found = f"holds a JSON {type(row).__name__}"
        raise CorpusError(found, expected="one JSON object on each line", where=where)
    return row


def decode(data: bytes, file: str, line: int = 1, offset: int = 0) -> str:
    """Bytes of a file from a line and byte offset on, as text; names both of the first bad byte."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise CorpusError(
            f"byte {data[error.start]:#04x} at byte offset {offset + error.start} is not UTF-8",
            where=f"{file}:{line}",
            remedy="Convert the file to UTF-8 (for example with iconv).",
        ) from None


def _sha256_of(files: list[Path]) -> str:
    """sha256 over the bytes of the files, in order; names and places do not matter."""
    total = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise CorpusError(f"cannot be read ({error.strerror})", where=str(path)) from None
    return total.hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
