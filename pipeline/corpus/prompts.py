"""Prompts: what a model is asked to continue, read from the same sources as a corpus.

One idea: a prompt is an example without a target, so images, identities and files are those of a
corpus. A conversation asks for its last answer, whether the source has one or not; a text is
continued. What is left out is counted.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.config import Generate, Prepare, Source
from stillroom.pipeline.corpus.documents import Document, OpenSource
from stillroom.pipeline.corpus.files import ExampleFile
from stillroom.pipeline.corpus.identity import document_digest
from stillroom.pipeline.corpus.image_chat import ImageChat, ImageTokens
from stillroom.pipeline.corpus.images import place_images, places_of
from stillroom.pipeline.corpus.prefix_chat import PrefixChat
from stillroom.pipeline.corpus.tokenizer import CorpusTokenizer
from stillroom.pipeline.images import ImageStore
from stillroom.pipeline.record import Example, content_id


class PromptReader:
    """Reads the prompts of a run.

    Args:
        prepare: sources and window.
        generate: how long answers may be, how prompts are cut.
        tokenizer: the teacher's.

    Attributes:
        dropped: reasons and numbers of what was left out.
    """

    def __init__(self, prepare: Prepare, generate: Generate, tokenizer: CorpusTokenizer):
        self._prepare, self._generate, self._tokenizer = prepare, generate, tokenizer
        self.dropped: Counter[str] = Counter()

    def write(self, sources: list[OpenSource], directory: Path) -> int:
        """Write `prompts.arrow` and `images/` below a directory; returns the number of prompts.

        Raises:
            CorpusError: there is none; or one is empty or too long, and that is an error.
        """
        images, seen = ImageStore(directory / "images"), set()
        with ExampleFile(directory / "prompts.arrow") as file:
            for source, opened in zip(self._prepare.source, sources):
                for document in islice(opened.documents(), source.limit or None):
                    for data in document.images:
                        images.put(data)
                    for prompt in self._prompts(source, document, seen):
                        seen.add(prompt.example_id)
                        file.write(prompt)
        if not seen:
            names = ", ".join(source.name for source in self._prepare.source)
            raise CorpusError("no prompt came out of the sources", where=names)
        return len(seen)

    @property
    def image_facts(self) -> dict[str, Any]:
        """Identity of the image processor, if one had a part."""
        used = "_image_chat" in vars(self)
        return {"processor": self._image_chat.facts} if used else {}

    def _prompts(self, source: Source, document: Document, seen: set[str]) -> Iterator[Example]:
        if not document.messages and not document.text.strip():
            self._left_out(document, "empty_documents", "document is empty")
            return
        asked = questions(document) if self._generate.turns == "each" else (document,)
        for question in asked:
            prompt = self._read(source, question, seen)
            if prompt is not None:
                yield replace(prompt, document_id=document_digest(document))

    def _read(self, source: Source, document: Document, seen: set[str]) -> Example | None:
        token_ids, images = self._tokens(document)
        room = self._prepare.window - self._generate.max_tokens  # tokens
        if len(token_ids) > room:
            return self._left_out(
                document, "long_prompts", f"a prompt of {len(token_ids)} tokens", room
            )
        mask = np.zeros(len(token_ids), dtype=bool)  # no target: the answer is yet to come
        name = content_id(token_ids, mask, images)
        if name in seen:
            self.dropped["duplicate_prompts"] += 1
            return None
        return Example(name, "", source.name, token_ids, mask, images)

    def _tokens(self, document: Document) -> tuple[np.ndarray, tuple]:
        if document.messages and (document.images or self._tokenizer.has_processor):
            made: ImageTokens = self._image_chat.prompt(document)
            return made.token_ids, made.images
        token_ids = self._tokenizer.prompt(document)
        cut = self._generate.prompt_tokens if not document.messages else 0
        return token_ids[: cut or None], ()

    @cached_property
    def _image_chat(self) -> ImageChat | PrefixChat:
        return self._tokenizer.image_chat(self._prepare.processor_args)

    def _left_out(self, document: Document, reason: str, found: str, room: int = 0) -> None:
        table, key = ("[generate]", "long_prompts") if room else ("[prepare]", "empty_documents")
        choice = self._generate.long_prompts if room else self._prepare.empty_documents
        if choice == "error":
            raise CorpusError(
                found,
                expected=f"at most {room} ([prepare] window less max_tokens)" if room else "",
                where=document.where,
                remedy=f'Change it, or set {table} {key} = "skip".',
            )
        self.dropped[reason] += 1


def questions(document: Document) -> Iterator[Document]:
    """A conversation up to each user message that is answered or is the last; texts as they are."""
    messages = document.messages
    if document.images:
        messages = place_images(messages, len(document.images), document.where)
    for end, message in enumerate(messages, start=1):
        answered = end == len(messages) or messages[end]["role"] == "assistant"
        if message["role"] == "user" and answered:
            shown = document.images[: places_of(messages[:end]) if document.images else 0]
            yield replace(document, messages=messages[:end], images=shown)
    if not messages:
        yield document
