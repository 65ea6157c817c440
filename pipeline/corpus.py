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
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from cache_schemas.errors import ConfigError, CorpusError
from pipeline.config import Prepare, Source
from pipeline.corpus_chat import Tokens
from pipeline.corpus_files import (
    SPLITS,
    Corpus,
    ExampleFile,
    read_examples,
    replace_directory,
    write_facts,
)
from pipeline.corpus_sources import Document, OpenSource, open_source
from pipeline.corpus_tokenizer import CorpusTokenizer, tokenizer_facts
from pipeline.record import Example, content_id

__all__ = ["Corpus", "PrepareProgress", "prepare", "tokenizer_facts", "windows"]

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
        drawn = _Drawing(config, tokenizer, progress or (lambda _: None))
        drawn.write(sources, made / "all.arrow")
        write_facts(made, identity | _split(drawn, made))
        replace_directory(made, target)
    return Corpus.open(target)


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


def heldout_documents(documents: Iterable[str], share: float, seed: int) -> set[str]:
    """The documents to hold out: those with the lowest hash, the same ones for the same seed.

    At least one and never all, so both splits have something in them.

    Raises:
        CorpusError: there is one document only, and something should be held out.
    """
    ordered = sorted(set(documents), key=lambda d: hashlib.sha256(f"{seed}:{d}".encode()).digest())
    if share == 0:
        return set()
    if len(ordered) < 2:
        raise CorpusError(
            "the corpus is one document, and a document is never split between train and held-out",
            where="[prepare] heldout",
            remedy="Add documents, cut the file into several, or set heldout = 0.",
        )
    return set(ordered[: min(max(1, round(share * len(ordered))), len(ordered) - 1)])


class _Drawing:
    """One pass over the sources: examples in an Arrow file, and counts of everything left out."""

    def __init__(self, config: Prepare, tokenizer: CorpusTokenizer, progress):
        self.config, self.tokenizer, self.progress = config, tokenizer, progress
        self.documents: dict[str, None] = {}
        self.dropped: Counter[str] = Counter()
        self.used_template = False
        self.tokens = self.highest_id = 0
        self._seen: set[str] = set()

    def write(self, sources: list[OpenSource], path: Path) -> None:
        """Write the examples of all sources in order.

        Raises:
            CorpusError: there are none.
        """
        with ExampleFile(path) as file:
            for source, opened in zip(self.config.source, sources):
                for example in self._examples(source, opened):
                    file.write(example)
        if not self._seen:
            raise self._nothing()
        self.tokenizer.check_ids(self.highest_id)

    def _examples(self, source: Source, opened: OpenSource) -> Iterator[Example]:
        kept = islice(opened.documents(), source.limit or None)
        read = 0
        for documents in _chunks(self._not_empty(kept)):
            read += len(documents)
            for document, tokens in zip(documents, self._tokenise(documents)):
                yield from self._windows(source.name, _document_id(document), tokens)
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

    def _tokenise(self, documents: list[Document]) -> Iterator[Tokens]:
        """A source holds texts or conversations, never both."""
        if not documents[0].messages:
            return self.tokenizer.texts([document.text for document in documents])
        self.used_template = True
        return map(self.tokenizer.chat, documents)

    def _windows(self, source: str, document_id: str, tokens: Tokens) -> Iterator[Example]:
        for token_ids, mask in windows(tokens, self.config.window, self.config.overlap):
            example_id = content_id(token_ids, mask)
            if reason := self._unfit(token_ids, mask, example_id):
                self.dropped[reason] += 1
                continue
            self._count(example_id, document_id, token_ids)
            yield Example(example_id, document_id, source, token_ids, mask)

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


def _split(drawn: _Drawing, made: Path) -> dict[str, Any]:
    """Deal the examples to the splits by document; counts and digest of the result."""
    held = heldout_documents(drawn.documents, drawn.config.heldout, drawn.config.seed)
    counts = {name: Counter(documents=0, examples=0, tokens=0, targets=0) for name in SPLITS}
    counts["heldout"]["documents"] = len(held)
    counts["train"]["documents"] = len(drawn.documents) - len(held)
    digest = hashlib.sha256()
    with ExitStack() as stack:
        files = {n: stack.enter_context(ExampleFile(made / f"{n}.arrow")) for n in SPLITS}
        for example in read_examples(made / "all.arrow"):
            name = "heldout" if example.document_id in held else "train"
            files[name].write(example)
            digest.update(_line(name, example))
            size = {"examples": 1, "tokens": len(example.token_ids)}
            counts[name].update(size, targets=int(example.loss_mask[1:].sum()))
    (made / "all.arrow").unlink()
    digest.update(_json(drawn.tokenizer.facts | _meaning(drawn.config)))
    template = drawn.tokenizer.template if drawn.used_template else ""
    return {
        "digest": digest.hexdigest(),
        "counts": {name: dict(count) for name, count in counts.items()},
        "dropped": dict(drawn.dropped),
        "chat_template": template,
    }


def _identity(config: Prepare, tokenizer: CorpusTokenizer, sources: list[OpenSource]) -> dict:
    """Everything that the result follows from: equal identities need no second preparation."""
    settings = config.model_dump(mode="json", exclude={"tokenizer"})
    facts = [source.facts for source in sources]
    return {"tokenizer": tokenizer.facts, "settings": settings, "sources": facts}


def _unchanged(directory: Path, identity: dict) -> Corpus | None:
    try:
        corpus = Corpus.open(directory)
    except CorpusError:
        return None
    same = all(corpus.facts.get(key) == json.loads(_json(v)) for key, v in identity.items())
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


def _document_id(document: Document) -> str:
    content = document.text.encode() if document.text else _json(list(document.messages))
    return hashlib.sha256(content).hexdigest()[:32]


def _line(split: str, example: Example) -> bytes:
    facts = (split, example.example_id, example.document_id, example.source, example.weight)
    return _json(list(facts)) + b"\n"


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _chunks(documents: Iterator[Document]) -> Iterator[list[Document]]:
    while chunk := list(islice(documents, DOCUMENTS_PER_CALL)):
        yield chunk
