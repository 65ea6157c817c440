"""Prompts: what a model is asked to continue, read from the same sources as a corpus.

One idea: a prompt is an example without a target, so images, identities and files are those of a
corpus. A conversation asks for its last answer, whether the source has one or not; a text is
continued. What is left out is counted.
"""

from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from cache_schemas.errors import CorpusError
from pipeline.config import Generate, Prepare, Source
from pipeline.corpus import document_digest
from pipeline.corpus_files import ExampleFile
from pipeline.corpus_image_chat import ImageChat, ImageTokens
from pipeline.corpus_prefix_chat import PrefixChat
from pipeline.corpus_sources import Document, OpenSource
from pipeline.corpus_tokenizer import CorpusTokenizer
from pipeline.images import ImageStore
from pipeline.record import Example, content_id


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
                    prompt = self._read(source, document, seen)
                    if prompt is not None:
                        for data in document.images:
                            images.put(data)
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

    def _read(self, source: Source, document: Document, seen: set[str]) -> Example | None:
        if not document.messages and not document.text.strip():
            return self._left_out(document, "empty_documents", "document is empty")
        token_ids, images = self._tokens(document)
        room = self._prepare.window - self._generate.max_tokens
        if len(token_ids) > room:
            return self._left_out(
                document, "long_prompts", f"a prompt of {len(token_ids)} tokens", room
            )
        mask = np.zeros(len(token_ids), dtype=bool)
        name = content_id(token_ids, mask, images)
        if name in seen:
            self.dropped["duplicate_prompts"] += 1
            return None
        return Example(name, document_digest(document), source.name, token_ids, mask, images)

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


def read_all(directory: Path) -> Iterator[Example]:
    """The prompts below a directory, in order."""
    from pipeline.corpus_files import read_examples

    return read_examples(directory / "prompts.arrow")
