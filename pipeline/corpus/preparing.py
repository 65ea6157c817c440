"""Prepare a corpus: documents -> tokens -> windows -> train and held-out examples.

One idea: preparing is deterministic and happens once. Windows of a document never straddle the two
splits, every token but a document's first is predicted in exactly one window when windows overlap,
each window of a text begins as the tokenizer begins a text (BOS), and the corpus is named by a
digest that the cache's plan repeats. What is left out is counted.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.cache_schemas.errors import ConfigError, CorpusError
from stillroom.pipeline.config import Prepare, Source
from stillroom.pipeline.corpus.documents import Document, OpenSource, Rejected, chunks, first_words
from stillroom.pipeline.corpus.files import Corpus, ExampleFile, write_facts
from stillroom.pipeline.corpus.fitting import Fitting, Made
from stillroom.pipeline.corpus.identity import (
    chat_settings,
    document_digest,
    edges,
    identity,
    meaning,
    unchanged,
)
from stillroom.pipeline.corpus.image_chat import ImageChat, ImageTokens
from stillroom.pipeline.corpus.item_questions import holds_interactions, write_interactions
from stillroom.pipeline.corpus.nothing_left import nothing_came_out
from stillroom.pipeline.corpus.opening import open_source
from stillroom.pipeline.corpus.prefix_chat import PrefixChat
from stillroom.pipeline.corpus.privileged import Prompts, teacher_prompts
from stillroom.pipeline.corpus.rejects import FILE, Rejects
from stillroom.pipeline.corpus.scratch import replace_directory, scratch_beside
from stillroom.pipeline.corpus.splits import deal, heldout_documents
from stillroom.pipeline.corpus.tokenizer import CorpusTokenizer, tokenizer_facts
from stillroom.pipeline.corpus.windows import windows
from stillroom.pipeline.images import ImageStore
from stillroom.pipeline.record import Example, content_id

__all__ = [
    "Corpus",
    "PrepareProgress",
    "heldout_documents",
    "prepare",
    "tokenizer_facts",
    "windows",
]

Say = Callable[[str], None]


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
    trusts_code: bool = False,
    say: Say = lambda _: None,
) -> Corpus:
    """Make a corpus, or open the one that is already there when nothing has changed.

    Args:
        config: sources, window, split.
        teacher_model: HF directory or hub id of the teacher; its tokenizer is the default, and
            `config.tokenizer` has to agree with it. Empty when only `config.tokenizer` counts.
        directory: where the corpus goes.
        progress: called now and then.
        revision: of the teacher on the hub.
        trusts_code: whether Python code of the teacher's directory may be run.
        say: told what the sources are taken for, before any of them is read.

    Raises:
        ConfigError: settings that contradict each other or the teacher's context.
        CorpusError: sources or tokenizer that cannot be used; nothing is left behind.
    """
    tokenizer = CorpusTokenizer.open(
        config.tokenizer, teacher_model, revision, trusts_code, chat_settings(config)
    )
    _check_window(config, tokenizer)
    sources = [open_source(source) for source in config.source]
    for opened in sources:
        say(opened.words)
    facts = identity(config, tokenizer, sources)
    target = Path(directory)
    if (found := unchanged(target, facts)) is not None:
        return found
    with scratch_beside(target) as scratch:
        made = scratch / "corpus"
        made.mkdir()
        tell = progress or (lambda _: None)
        if holds_interactions(config):
            write_facts(made, facts | write_interactions(config, tokenizer, made, _report(tell)))
        else:
            drawn = _Drawing(config, tokenizer, tell, made)
            drawn.write(sources)
            write_facts(made, facts | drawn.facts() | drawn.deal())
        replace_directory(made, target)
    return Corpus.open(target)


def _report(tell: Callable[[PrepareProgress], None]) -> Callable[[int, int, int], None]:
    return lambda *counts: tell(PrepareProgress(*counts))


class _Drawing:
    """One pass over the sources: examples in an Arrow file, and counts of everything left out."""

    def __init__(self, config: Prepare, tokenizer: CorpusTokenizer, progress, directory: Path):
        self.config, self.tokenizer, self.progress = config, tokenizer, progress
        self.documents: dict[str, None] = {}
        self.dropped: Counter[str] = Counter()
        self.repeats: Counter[str] = Counter()
        self.used_template = False
        self.tokens = self.highest_id = 0
        self._drawn = directory / "all.arrow"
        self._images = ImageStore(directory / "images")
        self._rejects = Rejects(config.on_error, directory / FILE)
        self._seen: set[str] = set()
        self._again: Counter[str] = Counter()

    def write(self, sources: list[OpenSource]) -> None:
        """Write the examples of all sources in order.

        Raises:
            CorpusError: there are none; or rows that cannot be used.
        """
        with ExampleFile(self._drawn) as file:
            for source, opened in zip(self.config.source, sources):
                for example in self._examples(source, opened):
                    file.write(example)
        if not self._seen:
            raise nothing_came_out(self.config, self.dropped)
        self.tokenizer.check_ids(self.highest_id)

    def deal(self) -> dict[str, Any]:
        """Digest and counts of the splits, made of what `write` wrote."""
        covered = self.tokenizer.facts | meaning(self.config) | self.image_facts
        covered |= edges(self.config, self.tokenizer)
        weights = self._again if self.config.duplicates == "keep" else {}
        share, seed = self.config.heldout, self.config.seed
        return deal(self._drawn, self.documents, share, seed, covered, weights)

    def facts(self) -> dict[str, Any]:
        """What was left out, and what turned conversations into tokens."""
        template = self.tokenizer.template if self.used_template else ""
        dropped = self.dropped + Counter(rejected_rows=self._rejects.count)
        return {
            "dropped": dict(+dropped),
            "repeats": dict(self.repeats),
            "chats": {name: count for name, count in sorted(self._notes.items()) if count},
            "chat_template": template,
            **self.image_facts,
        }

    def _examples(self, source: Source, opened: OpenSource) -> Iterator[Example]:
        kept = islice(self._rejects.good(opened.read()), source.limit or None)
        read = 0
        for documents in chunks(self._not_empty(kept)):
            read += len(documents)
            for document, made, prompts in self._made(documents):
                yield from self._kept(source.name, document, zip(made, prompts))
            self.progress(PrepareProgress(read, len(self._seen), self.tokens))
        self._rejects.stop()

    def _not_empty(self, documents: Iterable[Document]) -> Iterator[Document]:
        for document in documents:
            if document.messages or document.text.strip():
                yield document
            elif self.config.empty_documents == "error":
                remedy = 'Remove it, or set [prepare] empty_documents = "skip".'
                error = CorpusError("document is empty", where=document.where, remedy=remedy)
                self._rejects.take(Rejected(error))
            else:
                self.dropped["empty_documents"] += 1

    def _made(
        self, documents: list[Document]
    ) -> Iterator[tuple[Document, Iterable[Made], Prompts]]:
        """Documents with their windows and what the teacher reads before each. A source holds texts
        or conversations, never both."""
        if documents[0].messages:
            yield from self._conversations(documents)
            return
        written = [document.text for document in documents]
        size, overlap = self.config.window, self.config.overlap
        begin = len(self.tokenizer.begin_ids)
        for document, tokens in zip(
            documents, self.tokenizer.texts(written, self.config.end_of_text)
        ):
            yield document, windows(tokens, size, overlap, begin), repeat(None)

    def _conversations(
        self, documents: list[Document]
    ) -> Iterator[tuple[Document, list[Made], Prompts]]:
        self.used_template = True
        for document in documents:
            try:
                made = self._fitting(document)
                yield document, made, list(teacher_prompts(document, made, self._fitting))
            except CorpusError as error:
                self._rejects.take(Rejected(error, first_words(document.messages)))

    @cached_property
    def _fitting(self) -> Fitting:
        how, least = self.config.long, self.tokenizer.least
        return Fitting(self._chat, self.config.window, how, self.dropped, self._notes, least)

    def _chat(self, document: Document) -> list[Made]:
        """Conversations with images, and all others of an image-text teacher, go through its
        processor."""
        plain = not document.images and not self.tokenizer.has_processor
        made = list(self.tokenizer.chat(document) if plain else self._image_chat(document))
        self.dropped["windows_without_targets"] += not made
        return made

    @cached_property
    def _image_chat(self) -> ImageChat | PrefixChat:
        return self.tokenizer.image_chat(self.config.processor_args)

    @property
    def _notes(self) -> Counter[str]:
        """What the makers of examples noticed."""
        return self.tokenizer.notes

    @property
    def image_facts(self) -> dict[str, Any]:
        """What else identifies a corpus that an image processor had a part in."""
        used = "_image_chat" in vars(self)
        return {"processor": self._image_chat.facts} if used else {}

    def _kept(
        self, source: str, document: Document, made: Iterable[tuple[Made, np.ndarray | None]]
    ) -> Iterator[Example]:
        """The windows of a document that are examples."""
        if self._rejects.stopping:
            return
        document_id = document_digest(document)
        self.repeats["documents"] += document_id in self.documents
        for tokens, prompt in made:
            token_ids, mask = tokens[:2]
            images = tokens.images if isinstance(tokens, ImageTokens) else ()
            example_id = content_id(token_ids, mask, images)
            if reason := self._unfit(token_ids, mask, example_id):
                self.dropped[reason] += 1
                continue
            self._count(example_id, document_id, token_ids, prompt)
            yield Example(
                example_id, document_id, source, token_ids, mask, images, teacher_prompt=prompt
            )
        for data in document.images:
            self._images.put(data)

    def _unfit(self, token_ids: np.ndarray, mask: np.ndarray, example_id: str) -> str:
        if len(token_ids) < self.config.min_tokens:
            return "short_windows"
        if not mask[1:].any():
            return "windows_without_targets"
        if example_id not in self._seen:
            return ""
        self._again[example_id] += 1
        return "duplicate_windows"

    def _count(self, example_id: str, document_id: str, token_ids: np.ndarray, prompt) -> None:
        self._seen.add(example_id)
        self.documents[document_id] = None
        self.tokens += len(token_ids)
        read = token_ids if prompt is None else np.concatenate([token_ids, prompt])
        self.highest_id = max(self.highest_id, int(read.max()))


def _check_window(config: Prepare, tokenizer: CorpusTokenizer) -> None:
    begin, context = len(tokenizer.begin_ids), tokenizer.context
    if config.overlap + begin >= config.window:
        less = f" less the {begin} that a text begins with" * bool(begin)
        raise ConfigError(
            f"overlap = {config.overlap} leaves no new token in a window of {config.window}{less}",
            expected="overlap < window" + f" - {begin}" * bool(begin),
            where="[prepare]",
        )
    if config.end_of_text and tokenizer.hf.eos_token_id is None:
        raise ConfigError(
            "end_of_text = true with a tokenizer that has no end token",
            where="[prepare] end_of_text",
            remedy="Leave it out, or give the tokenizer an eos_token.",
        )
    if context and config.window > context:
        raise ConfigError(
            f"window = {config.window} is longer than the teacher's context of {context} tokens",
            where="[prepare]",
            remedy=f"Set window to {context} or less; longer documents are cut into windows.",
        )
