"""Questions about images for models that read a prefix in both directions (PaliGemma).

One idea: such a model knows no conversations: images and question are one prefix, whose tokens all
see each other, and the answer is a suffix that is written left to right. The processor puts both
together and says where the suffix begins, which is where the loss mask does.
"""

from typing import Any

import numpy as np

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.corpus.chat import refusals
from stillroom.pipeline.corpus.documents import Document
from stillroom.pipeline.corpus.image_chat import ImageTokens, check_places, pictures_of
from stillroom.pipeline.corpus.images import place_images
from stillroom.pipeline.images import image_sha256
from stillroom.pipeline.record import ImageSpan


class PrefixChat:
    """In the place of `ImageChat` for PaliGemma.

    Args:
        processor: of the model.
        arguments: passed to it with every call.
        facts: see `ImageChat`.
    """

    def __init__(self, processor: Any, arguments: dict[str, Any], facts: dict[str, Any]):
        self._processor, self._arguments, self.facts = processor, arguments, facts

    def __call__(self, document: Document) -> list[ImageTokens]:
        """One example: a question about images and its answer.

        Raises:
            CorpusError: it is anything else, or an image cannot be decoded.
        """
        if [message["role"] for message in document.messages] != ["user", "assistant"]:
            raise CorpusError(
                "this model answers one question, and the conversation is another",
                expected="one user message, one assistant message",
                where=document.where,
            )
        return [self._tokens(document, suffix=[_text(document, "assistant")])]

    def prompt(self, document: Document) -> ImageTokens:
        """A question without its answer."""
        return self._tokens(document)

    def _tokens(self, document: Document, **suffix: list[str]) -> ImageTokens:
        pictures = pictures_of(document)
        place_images(document.messages, len(pictures), document.where)
        text = self._processor.image_token * len(pictures) + _text(document, "user")
        check_places(self._processor, text, len(pictures), document.where)
        with refusals(document.where, "the processor refuses this question"):
            made = self._processor(
                text=[text], images=[pictures] if pictures else None, **suffix, **self._arguments
            )
        token_ids = np.asarray(made["input_ids"][0], dtype=np.int32)
        mask = np.asarray(made["token_type_ids"][0], dtype=bool) & bool(suffix)  # 1 in the suffix
        length = self._processor.image_seq_length
        spans = (
            ImageSpan(image_sha256(data), number * length, length)
            for number, data in enumerate(document.images)
        )
        return ImageTokens(token_ids, mask, tuple(spans))


def _text(document: Document, role: str) -> str:
    """What one side says, images left out."""
    placed = place_images(document.messages, len(document.images), document.where)
    parts = (part for m in placed if m["role"] == role for part in m["content"])
    return "".join(part.get("text") or "" for part in parts).strip()
