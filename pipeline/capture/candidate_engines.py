"""What a teacher recommends after a history: two engines with one kind of answer.

One idea: a language model knows no catalogue, so its answer is brought into one. `Grounded`
(BIGRec, arXiv 2308.08434) lets it write a title and takes the items whose embeddings are nearest to
that title's; `Scored` asks how probable each title of a shortlist is as the next line. Either gives
K places and distances that rise.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from stillroom.pipeline.capture.items import asked_about, bare, pooled
from stillroom.pipeline.capture.nearest import Nearest
from stillroom.pipeline.config.recommending import Candidates, Interactions, Items
from stillroom.pipeline.corpus.item_questions import LINE_END, text_example
from stillroom.pipeline.record import Example, TeacherRecord, content_id
from stillroom.pipeline.teacher import protocol


@dataclass(frozen=True, slots=True)
class Shelf:
    """What both engines know of the catalogue.

    Attributes:
        table: the [candidates] table.
        settings: those the questions were made with.
        tokenizer: has `hf`, the transformers tokenizer of teacher and corpus.
        titles: of every item.
        history: example id -> places of the items in its prompt.
        nearest: the items' embeddings; None where no step needs them.
        popular: places, those taken most often in training first.
    """

    table: Candidates
    settings: Interactions
    tokenizer: Any
    titles: Sequence[str]
    history: Callable[[str], np.ndarray]
    nearest: Nearest | None
    popular: np.ndarray

    def dropped(self, example: Example) -> np.ndarray:
        """Places that may not be candidates after this history."""
        seen = self.history(example.example_id)
        return seen if self.table.seen == "drop" else seen[:0]

    def record(self, example: Example, places, distances, written=()) -> TeacherRecord:
        """An answer, padded to K."""
        count = self.table.k
        ids = np.full(count, -1, dtype=np.int32)
        far = np.full(count, np.inf, dtype=np.float32)
        ids[: len(places)], far[: len(places)] = places, distances
        signals = {"candidate_ids": ids, "candidate_distances": far}
        if self.table.method == "grounded":
            signals["written_ids"] = np.asarray(written, dtype=np.int32)
        return TeacherRecord(bare(example), 0, signals)


class Grounded:
    """The title that the teacher writes, embedded, and the items nearest to it."""

    def __init__(self, engine: Any, shelf: Shelf, items: Items):
        self._engine, self._shelf, self._items = engine, shelf, items
        self._stop_ids = line_ends(shelf.tokenizer.hf)
        self.close = engine.close

    def score(
        self, examples: Iterable[Example], reject: protocol.Reject = protocol.stop
    ) -> Iterator[TeacherRecord]:
        """One record per history, in the order given; an empty list where the teacher wrote no
        title."""
        todo = iter(examples)
        while batch := list(islice(todo, self._shelf.table.batch)):
            yield from self._answer(batch, reject)

    def _answer(self, batch: list[Example], reject: protocol.Reject) -> Iterator[TeacherRecord]:
        good = [example for example in batch if self._fits(example, reject)]
        tokens = self._shelf.table.written_tokens
        written = self._engine.write([prompt_of(e) for e in good], tokens, self._stop_ids)
        ids = [example.example_id for example in good]
        said = dict(zip(ids, written))
        titles = {e: self._title(tokens) for e, tokens in said.items()}
        vectors = self._vectors({e: title for e, title in titles.items() if title}, reject)
        for example in batch:
            name = example.example_id
            places, distances = np.empty(0, dtype=np.int32), np.empty(0)
            if name in vectors:
                places, distances = self._near(example, vectors[name])
            yield self._shelf.record(example, places, distances, said.get(name, ()))

    def _fits(self, example: Example, reject: protocol.Reject) -> bool:
        """Whether the prompt and what is written after it are within the teacher's context."""
        shape, length = self._engine.shape, len(example.token_ids)
        try:
            protocol.check_example(example, shape, length)
            needed = len(prompt_of(example)) + self._shelf.table.written_tokens
            if shape.context and needed > shape.context:
                raise protocol.RejectedExample(
                    example,
                    f"{needed} tokens with those that are to be written",
                    expected=f"at most {shape.context}, the teacher's context",
                    remedy="Prepare with a smaller window, or lower written_tokens.",
                )
        except protocol.RejectedExample as error:
            reject(error)
            return False
        return True

    def _title(self, tokens: np.ndarray) -> str:
        """The title in what was written: its first line, without what stands around a title."""
        text = self._shelf.tokenizer.hf.decode(tokens, skip_special_tokens=True)
        line = " ".join(text.split(LINE_END)[0].split())
        before, behind = self._shelf.settings.line_template().around("title")
        return line.removeprefix(before.strip()).removesuffix(behind.strip()).strip()

    def _vectors(self, titles: dict[str, str], reject: protocol.Reject) -> dict[str, np.ndarray]:
        """Embeddings of written titles, made as the catalogue's were."""
        settings, more = self._shelf.settings, dict.fromkeys(self._shelf.settings.text_columns, "")
        template = settings.item_template()
        asked = (
            asked_about(
                text_example(
                    self._shelf.tokenizer,
                    template.fill(more | {"title": title}),
                    name,
                    name,
                ),
                self._items,
            )
            for name, title in titles.items()
        )
        found = {}
        for record in self._engine.score(asked, reject):
            vector = pooled(record, self._items)
            if len(vector) and np.isfinite(vector).all():
                found[record.example.example_id] = vector[0]
        return found

    def _near(self, example: Example, vector: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        nearest, shelf = self._shelf.nearest, self._shelf
        assert nearest is not None
        return nearest.search(vector, shelf.table.k, shelf.dropped(example))


class Scored:
    """The log-probability of each title of a shortlist as the next line."""

    def __init__(self, engine: Any, shelf: Shelf):
        self._engine, self._shelf = engine, shelf
        self.close = engine.close
        line = shelf.settings.line_template()
        lines = [line.fill({"title": title}) + LINE_END for title in shelf.titles]
        hf = shelf.tokenizer.hf
        self._answers = hf(lines, add_special_tokens=False, verbose=False)["input_ids"]

    def score(
        self, examples: Iterable[Example], reject: protocol.Reject = protocol.stop
    ) -> Iterator[TeacherRecord]:
        """One record per history, in the order given."""
        todo = iter(examples)
        while batch := list(islice(todo, self._shelf.table.batch)):
            lists = [self._shortlist(example) for example in batch]
            asked = [(e, int(place)) for e, places in zip(batch, lists) for place in places]
            pairs = [self._pair(example, place) for example, place in asked]
            told = partial(self._told, {p.example_id: one for p, one in zip(pairs, asked)}, reject)
            answers = map(_distance, self._engine.score(pairs, told))
            for example, places in zip(batch, lists):
                yield self._record(example, places, np.array(list(islice(answers, len(places)))))

    def _told(
        self,
        asked: dict[str, tuple[Example, int]],
        reject: protocol.Reject,
        error: protocol.RejectedExample,
    ) -> None:
        """A title that cannot be scored is a matter of its history, which people can look up."""
        example, place = asked[error.example.example_id]
        found = f"with the title '{self._shelf.titles[place][:60]}': {error.found}"
        more = {"expected": error.expected, "remedy": error.remedy}
        reject(protocol.RejectedExample(example, found, **more))

    def _record(self, example: Example, places: np.ndarray, distances: np.ndarray) -> TeacherRecord:
        order = np.lexsort((places, distances))[: self._shelf.table.k]
        order = order[np.isfinite(distances[order])]
        return self._shelf.record(example, places[order], distances[order])

    def _shortlist(self, example: Example) -> np.ndarray:
        shelf, count = self._shelf, self._shelf.table.shortlist_size
        gone = shelf.dropped(example)
        if shelf.nearest is None:
            return shelf.popular[~np.isin(shelf.popular, gone)][:count]
        mean = shelf.nearest.vectors[shelf.history(example.example_id)].mean(axis=0)
        return shelf.nearest.search(mean, count, gone)[0]

    def _pair(self, example: Example, place: int) -> Example:
        """The question with another title for its answer."""
        prompt, answer = prompt_of(example), self._answers[place]
        tokens = np.array([*prompt, *answer], dtype=np.int32)
        mask = np.arange(len(tokens)) >= len(prompt)
        return replace(
            example, example_id=content_id(tokens, mask), token_ids=tokens, loss_mask=mask
        )


def prompt_of(example: Example) -> np.ndarray:
    """int32 [n]: the tokens before the answer."""
    return example.token_ids[: int(np.argmax(example.loss_mask))]


def line_ends(hf: Any) -> list[int]:
    """Every token whose text holds the end of a line, and the one that ends a text."""
    texts = enumerate(hf.batch_decode([[i] for i in range(len(hf))]))
    found = {i for i, text in texts if LINE_END in text}
    return sorted(found | {hf.eos_token_id} - {None})


def _distance(record: TeacherRecord) -> float:
    """-log p of the answer's tokens, nats; infinite where there is no answer."""
    logprobs = record.signals["token_logprob"].astype(np.float64)
    return max(float(-logprobs.sum()), 0.0) if len(logprobs) else np.inf
