"""Formats of rows: which columns hold a text or a conversation, seen from the first rows.

One idea: a format is a name for people, the columns it reads, and a function from a row to
messages. It is recognised by what the values are, said aloud, and never changes within a source.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.config import Source
from stillroom.pipeline.config.strict import nearest
from stillroom.pipeline.corpus.conversations import (
    alpaca,
    as_list,
    captions,
    chosen,
    is_messages,
    is_sharegpt,
    messages,
    question_and_answer,
    sharegpt,
)
from stillroom.pipeline.corpus.documents import Row
from stillroom.pipeline.corpus.messages import Message

Convert = Callable[[Row], tuple[Message, ...]]
CHATS = ("messages", "conversations", "conversation", "chat", "dialogue", "dialog", "turns")
QUESTIONS = ("prompt", "question")
ANSWERS = ("completion", "response", "answer", "output", "chosen")
TEXTS = ("text", "content")
CAPTIONS = ("caption", "text")
IMAGES = ("images", "image")
NOT_CHATS = ("tools", "documents", "rejected", *QUESTIONS, *ANSWERS)


@dataclass(frozen=True)
class Format:
    """How the rows of a source are read.

    Attributes:
        name: as `[[prepare.source]] format` has it.
        columns: those that `convert` reads; the first has to be there.
        words: the format in words.
        convert: row -> messages; None where the first column is a text.
    """

    name: str
    columns: tuple[str, ...]
    words: str
    convert: Convert | None = None


def recognise(source: Source, rows: Sequence[Row]) -> Format:
    """The format of a source: what it says itself, or what its first rows show.

    Raises:
        CorpusError: they show nothing that is known.
    """
    kinds = [source.format] if source.format != "auto" else _possible(source)
    for kind in kinds:
        if (found := FINDERS[kind](source, rows)) is not None:
            return found
    raise _unknown(source, rows)


def _possible(source: Source) -> list[str]:
    if source.messages_column:
        return ["sharegpt", "messages"]
    return ["text"] if source.text_column else list(FINDERS)


def _messages(source: Source, rows: Sequence[Row]) -> Format | None:
    column = source.messages_column or _column(rows, CHATS, is_messages)
    if not column:
        return None
    words = f'messages in column "{column}"'
    return Format("messages", (column,), words, lambda row: messages(value(row, column), column))


def _sharegpt(source: Source, rows: Sequence[Row]) -> Format | None:
    named = (source.messages_column,) if source.messages_column else CHATS
    column = _column(rows, named, is_sharegpt)
    if not column and source.format == "sharegpt":
        column = source.messages_column or "conversations"
    if not column:
        return None
    words = f'ShareGPT conversations in column "{column}"'
    return Format("sharegpt", (column,), words, lambda row: sharegpt(value(row, column), column))


def _preference(source: Source, rows: Sequence[Row]) -> Format | None:
    names = _names(rows)
    if source.format != "preference" and not {"chosen", "rejected"} <= names:
        return None
    asked = source.messages_column or next((n for n in (*QUESTIONS, *CHATS) if n in names), "")
    words = 'the chosen answers of preferences in column "chosen"'
    words += f' to column "{asked}"' if asked else ""
    columns = ("chosen", *filter(None, (asked,)))
    return Format("preference", columns, words, lambda row: chosen(row, asked))


def _alpaca(source: Source, rows: Sequence[Row]) -> Format | None:
    names = _names(rows)
    said = "response" if "response" in names and "output" not in names else "output"
    given = "context" if "context" in names and "input" not in names else "input"
    if source.format != "alpaca" and not {"instruction", said} <= names:
        return None
    words = f'Alpaca instructions in columns "instruction", "{given}" and "{said}"'
    columns = ("instruction", given, said, "history")
    return Format("alpaca", columns, words, lambda row: alpaca(row, given, said))


def _completion(source: Source, rows: Sequence[Row]) -> Format | None:
    names = _names(rows)
    asked = next((name for name in QUESTIONS if name in names), "")
    said = next((name for name in ANSWERS if name in names), "")
    if source.format != "completion" and not (asked and said):
        return None
    asked, said = asked or "prompt", said or "completion"
    given = "context" if _column(rows, ("context",), _is_text) else ""
    words = f'questions in column "{asked}" and answers in column "{said}"'
    words += f', each question after its "{given}"' if given else ""
    labels = [row.values["label"] for row in rows if row.values.get("label") is not None]
    judged = bool(labels) and all(isinstance(label, bool) for label in labels)
    words += ', those with "label" false not learned' if judged else ""
    columns = (asked, said, *(["label"] if judged else []), *filter(None, (given,)))
    return Format(
        "completion", columns, words, lambda row: question_and_answer(row, asked, said, given)
    )


def _captions(source: Source, rows: Sequence[Row]) -> Format | None:
    image = source.image_column or _image_column(rows)
    text = source.text_column or next((n for n in CAPTIONS if _column(rows, (n,), _is_text)), "")
    if source.format != "captions" and not (image and text):
        return None
    column = text or "caption"
    words = f'captions in column "{column}" of images in column "{image}"'
    return Format("captions", (column,), words, lambda row: captions(value(row, column)))


def _text(source: Source, rows: Sequence[Row]) -> Format | None:
    column = source.text_column or _column(rows, TEXTS, _is_text)
    if not column and (source.format == "text" or any("text" in row.values for row in rows)):
        column = "text"
    return Format("text", (column,), f'texts in column "{column}"') if column else None


FINDERS: dict[str, Callable[[Source, Sequence[Row]], Format | None]] = {
    "preference": _preference,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "completion": _completion,
    "captions": _captions,
    "text": _text,
}


def image_column(source: Source, rows: Sequence[Row]) -> str:
    """The column of images: the one that is named, or a usual one that holds some."""
    return source.image_column or _image_column(rows)


def value(row: Row, column: str) -> Any:
    """A column of a row.

    Raises:
        CorpusError: there is none.
    """
    if column not in row.values:
        known = list(row.values)
        raise CorpusError(
            f"no column '{column}'",
            expected=f"one of {', '.join(sorted(known)) or 'none'}",
            where=row.where,
            remedy=nearest(column, known),
        )
    return row.values[column]


def _image_column(rows: Sequence[Row]) -> str:
    return _column(rows, IMAGES, lambda value: bool(value))


def _column(rows: Sequence[Row], names: Sequence[str], fits: Callable[[Any], bool]) -> str:
    """The first of some columns, or else of all, that holds what fits in most rows that fill it."""
    others = () if names in (TEXTS, CAPTIONS, IMAGES) or len(names) == 1 else _others(rows)
    for name in (*names, *others):
        filled = [row.values[name] for row in rows if row.values.get(name) not in (None, "", [])]
        if filled and 2 * sum(fits(as_list(one)) for one in filled) >= len(filled):
            return name
    return ""


def _others(rows: Sequence[Row]) -> tuple[str, ...]:
    names = dict.fromkeys(name for row in rows for name in row.values)
    return tuple(name for name in names if name not in (*CHATS, *NOT_CHATS))


def _names(rows: Sequence[Row]) -> set[str]:
    return {name for row in rows for name, value in row.values.items() if value is not None}


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _unknown(source: Source, rows: Sequence[Row]) -> CorpusError:
    known = sorted(dict.fromkeys(name for row in rows for name in row.values))
    return CorpusError(
        f"no column 'text', and no conversations that are known, in columns {', '.join(known)}",
        expected="a column of texts or messages, or the columns of a known format",
        where=rows[0].where if rows else source.path,
        remedy=f"{nearest('text', known)} Set [[prepare.source]] text_column, messages_column or "
        "format.".strip(),
    )
