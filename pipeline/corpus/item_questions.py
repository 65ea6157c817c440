"""The corpus of a recommender: sequences, catalogue, and what a teacher is asked about them.

One idea: a question is an ordinary example, the prompt with the titles before an item and, under
the loss mask, the item's own title; so whatever captures or trains on text can have it. It is named
by the hash of its tokens, and two users with one history and one next item share it. Training and
test rows are asked about; validation is the student's alone.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from stillroom.cache_schemas.errors import ConfigError, CorpusError
from stillroom.pipeline.config import Prepare, Source
from stillroom.pipeline.config.recommending import Interactions
from stillroom.pipeline.corpus.documents import Document, OpenSource
from stillroom.pipeline.corpus.files import Corpus, ExampleFile
from stillroom.pipeline.corpus.histories import ITEMS, Catalogue, Histories, Part
from stillroom.pipeline.corpus.interaction_files import find_pair, read_columns
from stillroom.pipeline.corpus.interactions import (
    Sequences,
    read_catalogue,
    read_log,
    sequences,
)
from stillroom.pipeline.corpus.splits import canonical_json
from stillroom.pipeline.corpus.tokenizer import CorpusTokenizer
from stillroom.pipeline.record import Example, content_id

QUESTIONS_PER_CALL = 1024
LINE_END = "\n"
PARTS: dict[str, Part] = {"train": "train", "heldout": "test"}
"""Split of the corpus -> rows that its questions are about."""
Tell = Callable[[int, int, int], None]
"""Told of histories read, examples made and their tokens."""


def open_interactions(source: Source) -> OpenSource:
    """Find the two files of a source of kind `interactions` and hash them.

    Raises:
        CorpusError: one of them is not there.
    """
    paths = find_pair(source.path, settings_of(source).catalogue)
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    facts = {"name": source.name, "kind": source.kind, "files": 2, "sha256": digest.hexdigest()}
    facts["format"] = "interactions of users with items"
    return OpenSource(facts, _no_documents)


def holds_interactions(config: Prepare) -> bool:
    """Whether this is the corpus of a recommender.

    Raises:
        ConfigError: interactions beside other sources.
    """
    kinds = [source.kind for source in config.source]
    if "interactions" in kinds and len(kinds) > 1:
        raise ConfigError(
            "interactions beside other sources",
            expected="one source of kind 'interactions' alone",
            where="[[prepare.source]]",
            remedy="Prepare them in runs of their own.",
        )
    return kinds == ["interactions"]


def settings_of(source: Source) -> Interactions:
    """The source's [prepare.source.interactions], or its defaults."""
    return source.interactions or Interactions()


def settings_in(corpus: Corpus) -> Interactions:
    """The [prepare.source.interactions] that a corpus was made with."""
    given = corpus.facts["settings"]["source"][0].get("interactions") or {}
    return Interactions.model_validate(given)


def write_interactions(
    config: Prepare, tokenizer: CorpusTokenizer, directory: Path, tell: Tell
) -> dict[str, Any]:
    """Write catalogue, items, sequences and questions; returns the corpus's facts.

    Raises:
        CorpusError: the files hold something that no rule covers.
    """
    source, settings = config.source[0], settings_of(config.source[0])
    found = _read(config, settings)
    found.catalogue.write(directory)
    items = item_examples(found.catalogue, tokenizer)
    with ExampleFile(directory / ITEMS) as file:
        for example in items:
            file.write(example)
    asked = _Questions(config.window, settings, found, tokenizer, source.name)
    histories, counts = asked.write(directory, tell)
    histories.write(directory)
    dropped = found.dropped | dict(asked.dropped)
    facts = {"dropped": dropped, "chat_template": "", "interactions": found.facts}
    facts |= {"catalogue": found.catalogue.facts, "counts": counts}
    return facts | {"digest": _digest(facts, histories, tokenizer, config)}


def item_examples(catalogue: Catalogue, tokenizer: CorpusTokenizer) -> Iterator[Example]:
    """One example per item, named by the item's content."""
    for place, text in enumerate(catalogue.texts):
        yield text_example(tokenizer, text, catalogue.key(place), catalogue.item_ids[place])


def text_example(tokenizer: Any, text: str, example_id: str, document_id: str) -> Example:
    """A text and one token that ends it, so that the last row is about the state of its last token.

    Args:
        tokenizer: has `hf`, a transformers tokenizer.
    """
    ids = tokenizer.hf(text, verbose=False)["input_ids"]
    end = tokenizer.hf.eos_token_id
    token_ids = np.array([*ids, 0 if end is None else end], dtype=np.int32)
    mask = np.zeros(len(token_ids), dtype=bool)
    mask[-1] = True
    return Example(example_id, document_id, "item", token_ids, mask)


class _Questions:
    """One pass over the rows that a teacher is asked about."""

    def __init__(
        self,
        window: int,
        settings: Interactions,
        found: Sequences,
        tokenizer: CorpusTokenizer,
        source: str,
    ):
        self._window, self._settings, self._found = window, settings, found
        self._hf, self._source = tokenizer.hf, source
        self._bare = Histories(found.users, found.offsets, found.items, pa.array([], pa.string()))
        line = settings.line_template()
        self._lines = [line.fill({"title": title}) for title in found.catalogue.titles]
        self._answers = self._tokens([line + LINE_END for line in self._lines], special=False)
        self.dropped: Counter[str] = Counter()

    def write(self, directory: Path, tell: Tell) -> tuple[Histories, dict[str, dict[str, int]]]:
        """Write both splits; returns the sequences with their questions' ids, and counts."""
        ids = np.full(len(self._found.items), "", dtype=object)
        counts = {}
        with ExitStack() as stack:
            for split, part in PARTS.items():
                file = stack.enter_context(ExampleFile(directory / f"{split}.arrow"))
                rows = self._bare.rows(part)
                counts[split] = self._write_part(file, rows, ids, tell)
                counts[split]["documents"] = len(np.unique(self._bare.owners(rows)))
        found = self._found
        named = pa.array(ids, pa.string())
        return Histories(found.users, found.offsets, found.items, named), counts

    def _write_part(
        self, file: ExampleFile, rows: np.ndarray, ids: np.ndarray, tell: Tell
    ) -> dict[str, int]:
        seen: set[str] = set()
        count = Counter(documents=0, examples=0, tokens=0, targets=0)
        for row, example in self._examples(iter(rows.tolist())):
            ids[row] = example.example_id
            if example.example_id in seen:
                self.dropped["questions_that_users_share"] += 1
                continue
            seen.add(example.example_id)
            file.write(example)
            targets = int(example.loss_mask[1:].sum())
            count.update(examples=1, tokens=len(example.token_ids), targets=targets)
            if count["examples"] % QUESTIONS_PER_CALL == 0:
                tell(len(seen), count["examples"], count["tokens"])
        return dict(count)

    def _examples(self, rows: Iterator[int]) -> Iterator[tuple[int, Example]]:
        while part := list(islice(rows, QUESTIONS_PER_CALL)):
            windows = self._bare.windows(np.array(part), self._settings.history, -1)
            shown = [window[window >= 0].tolist() for window in windows]
            prompts = self._tokens([self._prompt(items) for items in shown])
            for row, items, prompt in zip(part, shown, prompts):
                yield row, self._example(row, items, prompt)

    def _example(self, row: int, items: list[int], prompt: list[int]) -> Example:
        answer = self._answers[int(self._found.items[row])]
        shortened = False
        while len(prompt) + len(answer) > self._window:
            if len(items) < 2:
                raise self._too_long(len(prompt) + len(answer))
            items, shortened = items[1:], True
            prompt = self._tokens([self._prompt(items)])[0]
        self.dropped.update(["histories_cut_to_the_window"] * shortened)
        token_ids = np.array([*prompt, *answer], dtype=np.int32)
        mask = np.arange(len(token_ids)) >= len(prompt)
        user = self._found.users[int(self._bare.owners(np.array([row]))[0])]
        document = hashlib.sha256(user.encode()).hexdigest()[:32]
        return Example(content_id(token_ids, mask), document, self._source, token_ids, mask)

    def _prompt(self, items: list[int]) -> str:
        lines = LINE_END.join(self._lines[item] for item in items)
        return self._settings.prompt.replace("{history}", lines)

    def _tokens(self, texts: list[str], special: bool = True) -> list[list[int]]:
        return self._hf(texts, add_special_tokens=special, verbose=False)["input_ids"]

    def _too_long(self, tokens: int) -> CorpusError:
        return CorpusError(
            f"a question about one item has {tokens} tokens",
            expected=f"at most window = {self._window}",
            where="[prepare]",
            remedy="Raise window, or shorten prompt and titles.",
        )


def _read(config: Prepare, settings: Interactions) -> Sequences:
    interactions, items = find_pair(config.source[0].path, settings.catalogue)
    log = read_log(read_columns(interactions, settings.encoding), settings)
    columns = read_columns(items, settings.encoding)
    catalogue = read_catalogue(columns, settings, config.empty_documents, log.dropped)
    return sequences(log, catalogue, settings)


def _digest(facts: dict, histories: Histories, tokenizer: CorpusTokenizer, config: Prepare) -> str:
    """Over everything that gives a question or a row its meaning.

    `history`, prompt and line count by the questions they make: where all sequences are shorter
    than two values of `history`, a capture holds for both. What else follows from it, the length of
    a student's window, is in the identity of its training.
    """
    meaning = [facts["catalogue"], tokenizer.facts, config.window]
    digest = hashlib.sha256(canonical_json(meaning))
    for user in histories.users:
        digest.update(canonical_json(user))
    digest.update(np.ascontiguousarray(histories.offsets, dtype="<i8").tobytes())
    digest.update(np.ascontiguousarray(histories.items, dtype="<i4").tobytes())
    digest.update("\n".join(histories.example_ids.to_pylist()).encode())
    return digest.hexdigest()


def _no_documents() -> Iterator[Document]:
    raise CorpusError(
        "a source of interactions has no texts",
        where="[[prepare.source]]",
        remedy="Use `stillroom prepare`; answers to its questions are captured by [candidates].",
    )
