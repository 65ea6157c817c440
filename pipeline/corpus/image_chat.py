"""Conversations with images as tokens: what the teacher's own processor makes of them.

One idea: the processor is applied once, here. It expands each image's place in the rendered
conversation into placeholders and says which characters it replaced, so spans, loss mask and
tokens all follow from one text with its character offsets. Pixels are not kept: engines make
them again from the bytes, and must arrive at the same placeholders.
"""

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stillroom.cache_schemas.errors import CorpusError, first_line
from stillroom.pipeline.corpus.chat import (
    ChatSettings,
    ChatTokenizer,
    refusals,
    unanswered,
)
from stillroom.pipeline.corpus.documents import Document
from stillroom.pipeline.corpus.images import place_images, places_of
from stillroom.pipeline.corpus.spans import inside
from stillroom.pipeline.corpus.turns import Shown
from stillroom.pipeline.images import decode_image, image_sha256
from stillroom.pipeline.record import ImageSpan


class ImageTokens(NamedTuple):
    """A conversation as one example: int32 ids [L], bool mask [L], image spans in order."""

    token_ids: np.ndarray
    loss_mask: np.ndarray
    images: tuple[ImageSpan, ...]


class ImageChat:
    """Turns conversations with images into tokens by a model's processor.

    Args:
        processor: of the model; see `load_processor`.
        arguments: passed to the processor with every call, such as `max_pixels`.
        end_ids: ids that end a turn.
        settings: of the run's conversations.
        notes: counts what is noticed in them.

    Raises:
        CorpusError: the processor has no chat template.
    """

    def __init__(
        self,
        processor: Any,
        arguments: dict[str, Any],
        end_ids: tuple[int, ...] = (),
        settings: ChatSettings | None = None,
        notes: Counter[str] | None = None,
    ):
        self._processor = processor
        self._arguments = arguments
        self._chat = ChatTokenizer(processor.tokenizer, end_ids, settings, processor, notes)
        self.facts = {"sha256": settings_sha256(self._processor), "arguments": arguments}

    def __call__(self, document: Document) -> list[ImageTokens]:
        """The examples of a conversation.

        Raises:
            CorpusError: an image cannot be decoded, the numbers of images and of their places
                differ, or the processor refuses the conversation.
        """
        document = with_places(document)
        made = [self._example(document, example) for example in self._chat.shown(document)]
        self._chat.notes["tokens_read_again"] += sum(len(one.token_ids) for one in made[:-1])
        return made

    def prompt(self, document: Document) -> ImageTokens:
        """A conversation up to its last answer, without a target.

        Raises:
            CorpusError: as for a call; or an image belongs to the answer.
        """
        asked = with_places(replace(document, messages=unanswered(document)))
        return self._tokens(asked, self._chat.prompt(asked), [])

    def _example(self, document: Document, example: Shown) -> ImageTokens:
        shown = document.images[: places_of(document.messages[: example.upto])]
        spans = example.spans
        return self._tokens(replace(document, images=shown), example.text, spans)

    def _tokens(self, document: Document, text: str, spoken: list[tuple[int, int]]) -> ImageTokens:
        """The tokens of a rendered conversation, and which of them lie in `spoken`."""
        pictures = pictures_of(document)
        made = self._process(text, pictures, document.where)
        offsets = np.asarray(made["offset_mapping"][0]).reshape(-1, 2)
        replaced = (made.get("text_replacement_offsets") or [[]])[0]
        if len(replaced) != len(pictures):
            raise CorpusError(
                f"the chat template gave {len(replaced)} image places for {len(pictures)} images",
                where=document.where,
                remedy="Use the model's own chat template.",
            )
        hashes = [image_sha256(data) for data in document.images]
        spans = [_tokens_of(offsets, place["new_span"]) for place in replaced]
        grown = [
            (start + _growth(replaced, start), end + _growth(replaced, end))
            for start, end in spoken
        ]
        return ImageTokens(
            np.asarray(made["input_ids"][0], dtype=np.int32),
            inside(offsets, grown),
            tuple(ImageSpan(name, *span) for name, span in zip(hashes, spans)),
        )

    def _process(self, text: str, pictures: list, where: str) -> dict[str, Any]:
        check_places(self._processor, text, len(pictures), where)
        bos = self._processor.tokenizer.bos_token
        with refusals(where, "the processor refuses this conversation"):
            return self._processor(
                text=[text],
                images=[pictures] if pictures else None,
                add_special_tokens=not (bos and text.startswith(bos)),
                return_offsets_mapping=True,
                return_text_replacement_offsets=True,
                **self._arguments,
            )


def check_places(processor: Any, text: str, count: int, where: str) -> None:
    """Refuse a text that writes the model's image token where no image is: the processor would put
    the next image there, or none.

    Raises:
        CorpusError: another number of image tokens than of images.
    """
    token = getattr(processor, "image_token", None)
    if isinstance(token, str) and text.count(token) != count:
        raise CorpusError(
            f"the rendered text holds {token} {text.count(token)} times for {count} images",
            expected="that token where an image is, and nowhere else",
            where=where,
            remedy="Write it in another way where a text only speaks of it; if none does, use the "
            "model's own chat template.",
        )


def pictures_of(document: Document) -> list[Any]:
    """PIL images of a document.

    Raises:
        CorpusError: one cannot be decoded.
    """
    return [
        decode_image(data, f"{document.where} image {number}")
        for number, data in enumerate(document.images, start=1)
    ]


def with_places(document: Document) -> Document:
    """A document whose messages are lists of parts, with a place for each image."""
    messages = place_images(document.messages, len(document.images), document.where)
    return replace(document, messages=messages)


def _tokens_of(offsets: np.ndarray, characters: tuple[int, int]) -> tuple[int, int]:
    """(first token, number of tokens) of a run of characters."""
    start, end = characters
    touching = (offsets[:, 0] < end) & (offsets[:, 1] > start)
    at = np.flatnonzero(touching)
    return int(at[0]), int(at[-1]) - int(at[0]) + 1


def _growth(replaced: list[dict], character: int) -> int:
    """How far a place of the rendered text moved when the images before it were expanded."""
    before = [place for place in replaced if place["span"][1] <= character]
    return before[-1]["new_span"][1] - before[-1]["span"][1] if before else 0


def load_processor(directory: Path, trusts_code: bool = False) -> Any:
    """The image-text processor of a model.

    Raises:
        CorpusError: there is none, or it cannot be loaded.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(directory, trust_remote_code=trusts_code)
    except Exception as error:  # whatever a broken configuration makes the libraries raise
        reason = first_line(error)
        raise CorpusError(f"no processor can be loaded ({reason})", where=str(directory)) from None
    if not hasattr(processor, "image_processor"):
        raise CorpusError(
            "has no image processor",
            expected="preprocessor_config.json or processor_config.json of an image-text model",
            where=str(directory),
            remedy="Use an image-text teacher, or leave the images out.",
        )
    return processor


def has_image_processor(directory: Path) -> bool:
    """Whether a model directory comes with an image processor."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        try:
            settings = json.loads((directory / name).read_text())
        except (OSError, ValueError):
            continue
        if "image_processor" in settings or "image_processor_type" in settings:
            return True
    return False


def processor_sha256(directory: Path, trusts_code: bool = False) -> str:
    """Identity of a model's image processor: its settings, every default spelled out."""
    return settings_sha256(load_processor(directory, trusts_code))


def settings_sha256(processor: Any) -> str:
    """sha256 over a processor's settings in canonical form."""
    settings = json.loads(processor.to_json_string())
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
