"""Prepare a corpus: documents -> tokens -> windows -> train and held-out examples.

One idea: preparing is deterministic and happens once. Windows of a document never straddle the two
splits, every token but a document's first is predicted in exactly one window when windows overlap,
and the corpus is named by a digest that the cache's plan repeats. What is left out is counted.
"""

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.cache_schemas.errors import ConfigError, CorpusError
from stillroom.pipeline.config import Prepare, Source
from stillroom.pipeline.corpus.chat import Tokens
from stillroom.pipeline.corpus.documents import Document, OpenSource
from stillroom.pipeline.corpus.files import Corpus, ExampleFile, replace_directory, write_facts
from stillroom.pipeline.corpus.image_chat import ImageChat, ImageTokens
from stillroom.pipeline.corpus.item_questions import holds_interactions, write_interactions
from stillroom.pipeline.corpus.opening import open_source
from stillroom.pipeline.corpus.prefix_chat import PrefixChat
from stillroom.pipeline.corpus.splits import canonical_json, deal, heldout_documents
from stillroom.pipeline.corpus.tokenizer import CorpusTokenizer, tokenizer_facts
from stillroom.pipeline.images import ImageStore, image_sha256
from stillroom.pipeline.record import Example, content_id

__all__ = [
    "Corpus",
    "PrepareProgress",
    "heldout_documents",
    "prepare",
    "tokenizer_facts",
    "windows",
]

DOCUMENTS_PER_CALL = 64


@dataclass(frozen=True, slots=True)
class PrepareProgress:
    """How far preparing has come: documents read, examples and tokens made of them."""

    documents: int
    examples: int
    tokens: int


def prepare(
    config: Prepare,
    teacher_model: str,
    directory: str | Path,
    progress: Callable[[PrepareProgress], None] | None = None,
    revision: str = "",
) -> Corpus:
    """Make a corpus, or open the one that is already there when nothing has changed.

    Args:
        config: sources, window, split.
        teacher_model: HF directory or hub id of the teacher; its tokenizer is the default, and
            `config.tokenizer` has to agree with it. Empty when only `config.tokenizer` counts.
        directory: where the corpus goes.
        progress: called now and then.
        revision: of the teacher on the hub.

    Raises:
        ConfigError: settings that contradict each other or the teacher's context.
        CorpusError: sources or tokenizer that cannot be used; nothing is left behind.
    """
    tokenizer = CorpusTokenizer.open(config.tokenizer, teacher_model, revision)
    _check_window(config, tokenizer.context)
    sources = [open_source(source) for source in config.source]
    identity = _identity(config, tokenizer, sources)
    target = Path(directory)
    if (found := _unchanged(target, identity)) is not None:
        return found
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        made = Path(scratch, "corpus")
        made.mkdir()
        tell = progress or (lambda _: None)
        if holds_interactions(config):
            report = partial(_report, tell)
            write_facts(made, identity | write_interactions(config, tokenizer, made, report))
        else:
            drawn = _Drawing(config, tokenizer, tell)
            drawn.write(sources, made / "all.arrow")
            write_facts(made, identity | drawn.facts() | drawn.deal(made / "all.arrow"))
        replace_directory(made, target)
    return Corpus.open(target)


def _report(tell: Callable[[PrepareProgress], None], *counts: int) -> None:
    tell(PrepareProgress(*counts))


def windows(tokens: Tokens, size: int, overlap: int) -> Iterator[Tokens]:
    """Cut a document into windows of at most `size` tokens.

    Each window but the first begins with the last `overlap` tokens of the one before, as context:
    their loss mask is False, so they are read and never scored twice.
    """
    token_ids, mask = tokens
    start = 0
    while start < len(token_ids):
        kept = mask[start : start + size].copy()
        kept[: overlap if start else 0] = False
        yield token_ids[start : start + size], kept
        if start + size >= len(token_ids):
            return
        start += size - overlap


class _Drawing:
    """One pass over the sources: examples in an Arrow file, and counts of everything left out."""

    def __init__(self, config: Prepare, tokenizer: CorpusTokenizer, progress):
        self.config, self.tokenizer, self.progress = config, tokenizer, progress
        self.documents: dict[str, None] = {}  # a set that keeps its order
        self.dropped: Counter[str] = Counter()
        self.used_template = False
        self.tokens = self.highest_id = 0
        self._seen: set[str] = set()

    def write(self, sources: list[OpenSource], path: Path) -> None:
        """Write the examples of all sources in order.

        Raises:
            CorpusError: there are none.
        """
        images = ImageStore(path.parent / "images")
        with ExampleFile(path) as file:
            for source, opened in zip(self.config.source, sources):
                for example in self._examples(source, opened, images):
                    file.write(example)
        if not self._seen:
            raise self._nothing()
        self.tokenizer.check_ids(self.highest_id)

    def deal(self, path: Path) -> dict[str, Any]:
        """Digest and counts of the splits, made of what `write` wrote."""
        meaning = self.tokenizer.facts | _meaning(self.config) | self.image_facts
        return deal(path, self.documents, self.config.heldout, self.config.seed, meaning)

    def facts(self) -> dict[str, Any]:
        """What was left out, and what turned conversations into tokens."""
        template = self.tokenizer.template if self.used_template else ""
        return {"dropped": dict(self.dropped), "chat_template": template, **self.image_facts}

    def _examples(
        self, source: Source, opened: OpenSource, images: ImageStore
    ) -> Iterator[Example]:
        kept = islice(opened.documents(), source.limit or None)
        read = 0
        for documents in _chunks(self._not_empty(kept)):
            read += len(documents)
            for document, tokens in zip(documents, self._tokenise(documents)):
                for data in document.images:
                    images.put(data)
                yield from self._windows(source.name, document_digest(document), tokens)
            self.progress(PrepareProgress(read, len(self._seen), self.tokens))

    def _not_empty(self, documents: Iterable[Document]) -> Iterator[Document]:
        for document in documents:
            if document.messages or document.text.strip():
                yield document
                continue
            if self.config.empty_documents == "error":
                raise CorpusError(
                    "document is empty",
                    where=document.where,
                    remedy='Remove it, or set [prepare] empty_documents = "skip".',
                )
            self.dropped["empty_documents"] += 1

    def _tokenise(self, documents: list[Document]) -> Iterator[Tokens | ImageTokens]:
        """A source holds texts or conversations, never both."""
        if not documents[0].messages:
            return self.tokenizer.texts([document.text for document in documents])
        self.used_template = True
        return map(self._chat, documents)

    def _chat(self, document: Document) -> Tokens | ImageTokens:
        """Conversations with images, and all others of an image-text teacher, go through its
        processor."""
        if not document.images and not self.tokenizer.has_processor:
            return self.tokenizer.chat(document)
        return self._image_chat(document)

    @cached_property
    def _image_chat(self) -> ImageChat | PrefixChat:
        return self.tokenizer.image_chat(self.config.processor_args)

    @property
    def image_facts(self) -> dict[str, Any]:
        """What else identifies a corpus that an image processor had a part in."""
        used = "_image_chat" in vars(self)
        return {"processor": self._image_chat.facts} if used else {}

    def _windows(
        self, source: str, document_id: str, tokens: Tokens | ImageTokens
    ) -> Iterator[Example]:
        text, images = tokens[:2], tokens.images if isinstance(tokens, ImageTokens) else ()
        if images and len(tokens[0]) > self.config.window:
            self.dropped["conversations_with_images_longer_than_the_window"] += 1
            return
        for token_ids, mask in windows(text, self.config.window, self.config.overlap):
            example_id = content_id(token_ids, mask, images)
            if reason := self._unfit(token_ids, mask, example_id):
                self.dropped[reason] += 1
                continue
            self._count(example_id, document_id, token_ids)
            yield Example(example_id, document_id, source, token_ids, mask, images)

    def _unfit(self, token_ids: np.ndarray, mask: np.ndarray, example_id: str) -> str:
        if len(token_ids) < self.config.min_tokens:
            return "short_windows"
        if not mask[1:].any():
            return "windows_without_targets"
        return "duplicate_windows" if example_id in self._seen else ""

    def _count(self, example_id: str, document_id: str, token_ids: np.ndarray) -> None:
        self._seen.add(example_id)
        self.documents[document_id] = None
        self.tokens += len(token_ids)
        self.highest_id = max(self.highest_id, int(token_ids.max()))

    def _nothing(self) -> CorpusError:
        reasons = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in self.dropped.items())
        return CorpusError(
            "no example came out of the sources" + (f" (left out: {reasons})" if reasons else ""),
            expected="at least one document of two tokens",
            where=", ".join(source.name for source in self.config.source) or "[[prepare.source]]",
            remedy="Check the sources and [prepare] min_tokens.",
        )


def _identity(config: Prepare, tokenizer: CorpusTokenizer, sources: list[OpenSource]) -> dict:
    """Everything that the result follows from: equal identities need no second preparation."""
    # The tokenizer counts by what it does.
    settings = config.model_dump(mode="json", exclude={"tokenizer"}, exclude_none=True)
    facts = [source.facts for source in sources]
    return {"tokenizer": tokenizer.facts, "settings": settings, "sources": facts}


def _unchanged(directory: Path, identity: dict) -> Corpus | None:
    try:
        corpus = Corpus.open(directory)
    except CorpusError:
        return None
    if "processor" in corpus.facts:
        return None  # image files lie outside the sources' hashes
    same = all(
        corpus.facts.get(key) == json.loads(canonical_json(v)) for key, v in identity.items()
    )
    return corpus if same else None


def _meaning(config: Prepare) -> dict[str, Any]:
    return config.model_dump(include={"window", "overlap", "min_tokens", "heldout", "seed"})


def _check_window(config: Prepare, context: int) -> None:
    if config.overlap >= config.window:
        raise ConfigError(
            f"overlap = {config.overlap} leaves no new token in a window of {config.window}",
            expected="overlap < window",
            where="[prepare]",
        )
    if context and config.window > context:
        raise ConfigError(
            f"window = {config.window} is longer than the teacher's context of {context} tokens",
            where="[prepare]",
            remedy=f"Set window to {context} or less; longer documents are cut into windows.",
        )


def document_digest(document: Document) -> str:
    """The first 32 hex digits of sha256 over a document's text or messages and image hashes."""
    content = document.text.encode() if document.text else canonical_json(list(document.messages))
    for data in document.images:
        content += image_sha256(data).encode()
    return hashlib.sha256(content).hexdigest()[:32]


def _chunks(documents: Iterator[Document]) -> Iterator[list[Document]]:
    while chunk := list(islice(documents, DOCUMENTS_PER_CALL)):
        yield chunk
