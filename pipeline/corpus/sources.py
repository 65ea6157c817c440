"""Sources of rows: files that are found, hashed, recognised and read as documents.

One idea: a source is opened by looking at its first rows, so what it holds is known and said before
anything is paid for; every complaint names the file and the line. Sources do not tokenise.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.config import Source
from stillroom.pipeline.config.strict import nearest
from stillroom.pipeline.corpus.chat import placed
from stillroom.pipeline.corpus.conversations import messages as chat_messages
from stillroom.pipeline.corpus.documents import Document, OpenSource, Rejected, Row, first_words
from stillroom.pipeline.corpus.formats import Format, image_column, recognise, value
from stillroom.pipeline.corpus.images import inline_images, read_images, refuse_moving
from stillroom.pipeline.corpus.json_rows import read_json
from stillroom.pipeline.corpus.kinds import SUFFIXES, is_kind, known_kind
from stillroom.pipeline.corpus.messages import cleaned, decoded, without_nulls
from stillroom.pipeline.corpus.plain_files import read_captioned, read_text
from stillroom.pipeline.corpus.table_rows import read_arrow, read_parquet
from stillroom.pipeline.corpus.tar_rows import read_tar

BESIDE_THE_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
FIRST_ROWS = 8
NAMED = 3
"""Files that are named among those that are not read."""

ROWS: dict[str, Callable[[Path, list[str] | None], Iterator[Row | Rejected]]] = {
    "jsonl": lambda path, _: read_json(path),
    "webdataset": lambda path, _: read_tar(path),
    "parquet": read_parquet,
    "arrow": read_arrow,
}
WHOLE: dict[str, Callable[[Path], Iterator[Document | Rejected]]] = {
    "text": read_text,
    "images": read_captioned,
}


def find_files(source: Source) -> tuple[str, list[Path]]:
    """The kind and the files that a path, a glob or a directory names, in name order.

    Raises:
        CorpusError: there are none, or their kind is not known.
    """
    if not source.path:
        raise CorpusError("a source of files needs a path", where="[[prepare.source]] path")
    given = Path(source.path).expanduser()
    if given.is_dir() and (saved := _saved(given, source.split)):
        return "arrow", saved
    found = [given] if given.is_file() else sorted(_candidates(given))
    kinds = [source.kind] if source.kind in SUFFIXES else list(SUFFIXES)
    for kind in kinds:
        if files := [path for path in found if is_kind(path, kind) or not given.is_dir()]:
            kind = kind if source.kind in SUFFIXES else known_kind(files[0], source.path)
            return kind, files
    endings = [ending for kind in kinds for ending in SUFFIXES[kind]]
    raise CorpusError(
        "no such file, or nothing in it",
        where=source.path,
        expected=f"a file, a glob, or a directory with {', '.join(endings)}",
        remedy="Check [[prepare.source]] path.",
    )


def passed_over(source: Source, files: Sequence[Path]) -> str:
    """Words for what else lies in the directory of a source and is not read; pictures may belong to
    rows, and not to texts."""
    given = Path(source.path).expanduser()
    if not given.is_dir() or _saved(given, source.split):
        return ""
    read = {*files, *(p.with_suffix(".txt") for p in files if is_kind(p, "images"))}
    of_rows = not is_kind(files[0], "text")
    others = [p for p in sorted(_candidates(given)) if p not in read]
    others = [p for p in others if not (of_rows and is_kind(p, "images"))]
    if not others:
        return ""
    named = ", ".join(str(path.relative_to(given)) for path in others[:NAMED])
    return f"; not read: {named}" + f" and {len(others) - NAMED} more" * (len(others) > NAMED)


def files_source(source: Source, kind: str, files: list[Path], **more: str) -> OpenSource:
    """A source over files that have been found; `more` is added to its facts.

    Raises:
        CorpusError: a file cannot be read, or nobody knows what its rows are.
    """
    facts = {"name": source.name, "kind": source.kind, "files": len(files)}
    facts |= {"sha256": _sha256_of(files)} | more
    if kind in WHOLE:
        words = {"text": "a text in each file", "images": "a picture and its caption"}[kind]
        return OpenSource(facts | {"format": words}, partial(_whole_files, WHOLE[kind], files))
    reader = _Reader.of(source, kind, files)
    return OpenSource(facts | {"format": reader.words}, reader.documents, reader.aside)


class _Reader:
    """Rows of a source, as documents.

    Attributes:
        words: the format, in words.
        aside: columns of the first rows that hold something and are not read.
    """

    def __init__(
        self, source: Source, kind: str, files: list[Path], form: Format, rows: Sequence[Row]
    ):
        self._source, self._kind, self._files, self._form = source, kind, files, form
        self._image = image_column(source, rows) if form.convert else ""
        given = {"tools": source.tools_column, "documents": source.documents_column}
        self._context = {name: column or name for name, column in given.items()}
        self._system = source.system_column or "system"
        shown = self._image and form.name != "captions"
        self.words = form.words + (f', images in column "{self._image}"' if shown else "")
        filled = (name for row in rows for name, one in row.values.items() if one is not None)
        read = {*self._columns}
        self.aside = tuple(name for name in dict.fromkeys(filled) if name not in read)

    @classmethod
    def of(cls, source: Source, kind: str, files: list[Path]) -> "_Reader":
        """Look at the first rows."""
        found = (row for path in files for row in ROWS[kind](path, None))
        looked = list(islice(found, FIRST_ROWS))
        rows = [row for row in looked if isinstance(row, Row)]
        if not rows:
            bad = next((row.error for row in looked if isinstance(row, Rejected)), None)
            rows = [] if bad is None else _must_go_on(source, bad)
        form = recognise(source, rows) if rows else Format("text", ("text",), "nothing")
        return cls(source, kind, files, form, rows)

    def documents(self) -> Iterator[Document | Rejected]:
        """All documents, and rows that are none."""
        told = Counter[bool]()  # rows with and without the teacher's column
        for path in self._files:
            for row in ROWS[self._kind](path, self._columns):
                yield row if isinstance(row, Rejected) else self._made(row)
                if isinstance(row, Row):
                    told[self._source.teacher_messages_column in row.values] += 1
        if told[False] and not told[True]:
            self._check_column_of_teacher()

    @property
    def _columns(self) -> list[str]:
        more = (*self._context.values(), self._system, self._image, "chat_template_kwargs")
        more = (*more, self._source.teacher_messages_column)
        moving = ("video", "videos", "audio", "audios")
        return list(dict.fromkeys((*self._form.columns, *more, *moving)))

    def _made(self, row: Row) -> Document | Rejected:
        try:
            return self._document(row)
        except CorpusError as error:
            at_fault = placed(error, row.where)
            return Rejected(at_fault, first_words(row.values))  # type: ignore[arg-type]

    def _document(self, row: Row) -> Document:
        column = self._form.columns[0]
        if self._form.convert is None:
            return Document(row.where, text=_text(value(row, column), column))
        value(row, column)
        messages = cleaned(self._form.convert(row), row.arrow)
        messages = self._with_system(row, messages)
        refuse_moving(row.values, messages)
        document = Document(row.where, messages=messages, context=self._given(row))
        told = self._told(row)
        return replace(document, images=self._images(row, document), teacher_messages=told)

    def _told(self, row: Row) -> tuple:
        """What the teacher reads, where that is something else."""
        column = self._source.teacher_messages_column
        if not column or column not in row.values:
            return ()
        return cleaned(chat_messages(value(row, column), column), row.arrow)

    def _check_column_of_teacher(self) -> None:
        """A row may lack it; where every row does, its name is wrong."""
        if column := self._source.teacher_messages_column:
            raise CorpusError(
                f"no row has the column '{column}'",
                expected="one that some rows have",
                where=f"source '{self._source.name}' teacher_messages_column",
                remedy=nearest(column, self.aside) or "Leave it out where both read the same.",
            )

    def _with_system(self, row: Row, messages: tuple) -> tuple:
        """The messages after the row's system prompt, if it has one."""
        system = row.values.get(self._system)
        if not isinstance(system, str) or not system.strip() or not messages:
            return messages
        first = messages[0]
        if first["role"] != "system":
            return ({"role": "system", "content": system}, *messages)
        if first.get("content") != system:
            found = f"a system message, and another one in column '{self._system}'"
            raise CorpusError(found, remedy="Leave one of the two.")
        return messages

    def _given(self, row: Row) -> dict[str, Any]:
        """Tools, documents and arguments that a row brings for the chat template."""
        named = {name: row.values.get(column) for name, column in self._context.items()}
        found = {name: decoded(one, name) for name, one in named.items() if one}
        arguments = decoded(row.values.get("chat_template_kwargs"), "chat_template_kwargs")
        found = {name: one for name, one in found.items() if one} | (arguments or {})
        return {n: without_nulls(one) for n, one in found.items()} if row.arrow else found

    def _images(self, row: Row, document: Document) -> tuple[bytes, ...]:
        """Those of the image column, or those that the messages carry."""
        if self._source.image_column:
            value(row, self._source.image_column)
        found = row.values.get(self._image) if self._image else inline_images(document.messages)
        folder = Path(self._source.images_folder).expanduser()
        begin = folder if self._source.images_folder else row.folder
        return read_images(found, begin, row.where)


def _must_go_on(source: Source, bad: CorpusError) -> list[Row]:
    """With no good row among the first, only what the source says of itself can tell its format."""
    if source.format == "auto" and not (source.messages_column or source.text_column):
        raise bad
    return [Row(bad.where, {}, Path())]


def _text(found: Any, column: str) -> str:
    if found is None or isinstance(found, str):
        return found or ""
    raise CorpusError(
        f"column '{column}' holds {type(found).__name__}",
        expected="text",
        remedy="For chats set messages_column instead of text_column.",
    )


def _whole_files(read: Callable, files: list[Path]) -> Iterator[Document | Rejected]:
    for path in files:
        yield from read(path)


def _candidates(given: Path) -> Iterator[Path]:
    """Files below a directory or of a glob, without what lies beside the data."""
    if given.is_dir():
        found = given.rglob("*")
    else:
        anchor = Path(given.anchor)
        found = anchor.glob(str(given.relative_to(anchor)))
    top = given if given.is_dir() else Path()
    for path in found:
        inner = path.relative_to(top).parts if given.is_dir() else (path.name,)
        hidden = any(part.startswith(".") for part in inner)
        if path.is_file() and not hidden and path.name not in BESIDE_THE_DATA:
            yield path


def _saved(folder: Path, split: str) -> list[Path]:
    """The Arrow files of a folder that `datasets` saved, in their order; none of another folder."""
    try:
        if (folder / "dataset_dict.json").is_file():
            known = json.loads((folder / "dataset_dict.json").read_text())["splits"]
            if split not in known:
                found = f"has no split '{split}'"
                raise CorpusError(found, where=str(folder), remedy=nearest(split, known))
            folder = folder / split
        state = json.loads((folder / "state.json").read_text())
        return [folder / file["filename"] for file in state["_data_files"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorpusError(f"is no whole saved data set ({error})", where=str(folder)) from None


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
