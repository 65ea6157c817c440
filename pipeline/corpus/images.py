"""Images of conversations: where their bytes come from, and which place of the text each takes.

One idea: whatever way a data set names images (paths, bytes, data URLs, parts of a message,
`<image>` in the text), afterwards there is a list of bytes and as many parts `{"type": "image"}`,
in the same order, or an error that names the row. Nothing is decoded here.
"""

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.corpus.characters import decode

MARKER = "<image>"
"""LLaVA's way of writing an image into plain text."""
MOVING = ("video", "audio")


def place_images(
    messages: Sequence[dict[str, Any]], count: int, where: str
) -> tuple[dict[str, Any], ...]:
    """Messages whose content is a list of parts, with exactly `count` parts `{"type": "image"}`.

    Places are taken from image parts, else from `<image>` in the text; where there is neither, the
    images go before the first user message's text.

    Raises:
        CorpusError: another number of places than of images; one in an answer; or a content that is
            neither text nor parts.
    """
    placed = tuple(
        {**message, "content": _parts(message, f"{where}: message {at}")}
        for at, message in enumerate(messages, start=1)
    )
    if count and not places_of(placed):
        placed = _in_front(placed, count)
    if places_of(placed) != count:
        raise CorpusError(
            f"{count} images for {places_of(placed)} places in the messages",
            expected="one image for every place",
            where=where,
            remedy="Check the image column against the messages.",
        )
    return placed


def read_images(value: Any, folder: Path, where: str) -> tuple[bytes, ...]:
    """The bytes of the images that a row names: one or a list of paths, bytes, data URLs, or
    `{"bytes", "path"}` as Hugging Face data sets have them.

    Raises:
        CorpusError: a file is missing, or a value is nothing of that.
    """
    if value is None:
        return ()
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(_read_image(one, folder, where) for one in values)


def inline_images(messages: Sequence[dict[str, Any]]) -> list[Any]:
    """What image parts refer to, where messages carry their images themselves."""
    parts = (part for m in messages if isinstance(m.get("content"), list) for part in m["content"])
    keys = ("image", "path", "url", "image_url", "bytes")
    found = (
        next((part[key] for key in keys if part.get(key)), None)
        for part in parts
        if isinstance(part, dict) and part.get("type") in ("image", "image_url")
    )
    values = [
        value["url"] if isinstance(value, dict) and "url" in value else value for value in found
    ]
    return [value for value in values if value is not None]


def refuse_moving(row: dict[str, Any], messages: Sequence[dict[str, Any]]) -> None:
    """Refuse video and audio, which no teacher here is shown.

    Raises:
        CorpusError: a row has a column of them, or a message a part.
    """
    columns = (name for name in row if name.rstrip("s") in MOVING and row[name])
    lists = (m["content"] for m in messages if isinstance(m.get("content"), list))
    parts = (part.get("type") for content in lists for part in content if isinstance(part, dict))
    kinds = [*columns, *(kind for kind in parts if kind and {*kind.split("_")} & {*MOVING})]
    if kinds:
        raise CorpusError(
            f"holds {kinds[0]}, which is not shown to teachers",
            expected="texts and images",
            remedy='Drop that column or such rows, or set [prepare] on_error = "skip".',
        )


def caption_messages(caption: str) -> tuple[dict[str, Any], ...]:
    """An image and its caption as a conversation: nothing is asked but the image."""
    return {"role": "user", "content": ""}, {"role": "assistant", "content": caption}


def read_caption(path: Path) -> str:
    """The text beside an image file: `x.txt` for `x.png`."""
    caption = path.with_suffix(".txt")
    if not caption.is_file():
        raise CorpusError("has no caption beside it", expected=str(caption), where=str(path))
    return decode(_file(caption, str(path)), str(caption)).removeprefix("\ufeff").strip()


def _read_image(value: Any, folder: Path, where: str) -> bytes:
    if isinstance(value, dict) and (value.get("bytes") or value.get("path")):
        value = value.get("bytes") or value["path"]
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or "://" in value:
        raise CorpusError(
            f"an image is given as {str(value)[:60]!r}",
            expected="a path, bytes, or a data URL",
            where=where,
            remedy="Download images that lie behind an address.",
        )
    return _data_url(value, where) if value.startswith("data:") else _file(folder / value, where)


def _file(path: Path, where: str) -> bytes:
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        raise CorpusError(f"image {path}: {error.strerror}", where=where) from None


def _data_url(value: str, where: str) -> bytes:
    head, _, body = value.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError("not base64")
        return base64.b64decode(body, validate=True)
    except (ValueError, binascii.Error) as error:
        raise CorpusError(f"a data URL cannot be read ({error})", where=where) from None


def _parts(message: dict[str, Any], where: str) -> list[dict[str, Any]]:
    content = message.get("content")
    if isinstance(content, list):
        parts = [_plain_part(part, where) for part in content]
    elif isinstance(content, str) or content is None:
        parts = _parts_of_text(content or "")
    else:
        raise _no_part(content, where)
    if message["role"] == "assistant" and any(part.get("type") == "image" for part in parts):
        raise CorpusError(
            "an image in an answer, which no teacher here writes",
            expected="images in what others say",
            where=where,
            remedy=f"Move it, or write {MARKER} in another way.",
        )
    return parts


def _parts_of_text(text: str) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(text.split(MARKER)):
        parts += [{"type": "image"}] * bool(number)
        parts += [{"type": "text", "text": piece}] * bool(piece)
    return parts


def _plain_part(part: Any, where: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise _no_part(part, where)
    kept = {key: value for key, value in part.items() if value is not None}
    return {"type": "image"} if kept.get("type") in ("image", "image_url") else kept


def _no_part(value: Any, where: str) -> CorpusError:
    found = f"a content holds {type(value).__name__}"
    return CorpusError(found, expected="a text, or a list of parts", where=where)


def places_of(messages: Sequence[dict[str, Any]]) -> int:
    """Image places in messages as `place_images` makes them."""
    return sum(part.get("type") == "image" for m in messages for part in m["content"])


def _in_front(messages: tuple[dict[str, Any], ...], count: int) -> tuple[dict[str, Any], ...]:
    first = next((i for i, m in enumerate(messages) if m.get("role") == "user"), 0)
    images = [{"type": "image"}] * count
    changed = {**messages[first], "content": [*images, *messages[first]["content"]]}
    return (*messages[:first], changed, *messages[first + 1 :])
