"""Conversations that are longer than the window.

One idea: a long conversation is cut between an answer and the next question, and every piece is a
conversation of its own, rendered anew with the system prompt in front, so that no piece begins in
the middle of a turn. Only a single question and answer that is too long by itself loses its end.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal, TypeGuard

from stillroom.pipeline.corpus.chat import Tokens
from stillroom.pipeline.corpus.documents import Document
from stillroom.pipeline.corpus.image_chat import ImageTokens, with_places
from stillroom.pipeline.corpus.images import places_of
from stillroom.pipeline.corpus.messages import Message

Made = Tokens | ImageTokens
FIRST = ("system", "developer")
MANY = 32
"""Messages from which on a conversation's length is asked for before it is made."""


class Fitting:
    """Makes examples of at most a window of conversations of any length.

    Args:
        make: document -> examples.
        window: tokens of an example, at most.
        long: `[prepare] long`.
        dropped: counts what is left out.
        notes: counts what `make` notices; what it noticed in vain is taken back.
        least: document -> tokens that one of its examples has at least, for less than it costs to
            make them: every turn of a conversation is rendered with all of its history.
    """

    def __init__(
        self,
        make: Callable[[Document], Sequence[Made]],
        window: int,
        long: Literal["cut", "skip", "keep_end"],
        dropped: Counter[str],
        notes: Counter[str],
        least: Callable[[Document], int],
    ):
        self._make_counted, self._window, self._long = make, window, long
        self._dropped, self._notes, self._least = dropped, notes, least

    def __call__(self, document: Document) -> list[Made]:
        """The examples of a conversation.

        Raises:
            CorpusError: it cannot be tokenised.
        """
        made = None if self._too_long(document) else self._make(document)
        if self._fit(made):
            return list(made)
        if self._long == "skip":
            self._dropped["conversations_longer_than_the_window"] += 1
            return []
        head, exchanges = exchanges_of(document.messages)
        if self._long == "keep_end":
            return self._end(document, head, exchanges)
        self._dropped["conversations_cut_into_pieces"] += len(exchanges) > 1
        return [one for piece in self._pieces(document, head, exchanges) for one in piece]

    def _too_long(self, document: Document) -> bool:
        """Whether a conversation of many messages is longer than the window for certain."""
        if len(document.messages) < MANY or document.images:
            return False
        noticed = self._notes.copy()
        least = self._least(document)
        self._notes.clear()
        self._notes.update(noticed)
        return least > self._window

    def _make(self, document: Document, trial: bool = False) -> Sequence[Made]:
        noticed = self._notes.copy()
        made = self._make_counted(document)
        if trial or not self._fit(made):
            self._notes.clear()
            self._notes.update(noticed)
        return made

    def _fit(self, made: Sequence[Made] | None) -> TypeGuard[Sequence[Made]]:
        return made is not None and all(len(example[0]) <= self._window for example in made)

    def _pieces(
        self, document: Document, head: range, exchanges: list[range]
    ) -> Iterator[Sequence[Made]]:
        """Halves, and halves of halves, until each fits or is one exchange."""
        part = part_of(document, head, exchanges)
        alone = len(exchanges) < 2
        made = None if not alone and self._too_long(part) else self._make(part)
        if self._fit(made):
            yield made
        elif alone:
            yield list(self._shortened(made or ()))
        else:
            middle = len(exchanges) // 2
            for half in (exchanges[:middle], exchanges[middle:]):
                yield from self._pieces(document, head, half)

    def _end(self, document: Document, head: range, exchanges: list[range]) -> list[Made]:
        """The conversation without as many of its oldest exchanges as it takes."""
        low, high = 1, len(exchanges)
        while low < high:
            middle = (low + high) // 2
            rest = part_of(document, head, exchanges[middle:])
            if not self._too_long(rest) and self._fit(self._make(rest, trial=True)):
                high = middle
            else:
                low = middle + 1
        if low == len(exchanges):
            self._dropped["conversations_whose_last_turn_is_longer_than_the_window"] += 1
            return []
        self._dropped["conversations_without_their_beginning"] += 1
        self._dropped["messages_cut"] += sum(len(one) for one in exchanges[:low])
        return list(self._make(part_of(document, head, exchanges[low:])))

    def _shortened(self, made: Sequence[Made]) -> Iterator[Made]:
        """Examples without what lies beyond the window; with images, none that does not fit."""
        for example in made:
            beyond = len(example[0]) - self._window
            if beyond <= 0:
                yield example
            elif isinstance(example, ImageTokens):
                self._dropped["conversations_with_images_longer_than_the_window"] += 1
            else:
                self._dropped["tokens_cut"] += beyond
                yield example[0][: self._window], example[1][: self._window]


def exchanges_of(messages: Sequence[Message]) -> tuple[range, list[range]]:
    """Indices of the messages that lead (system prompts), and of each question with what follows
    until the next question."""
    lead = 0
    while lead < len(messages) and messages[lead]["role"] in FIRST:
        lead += 1
    asked = [i for i in range(lead, len(messages)) if messages[i]["role"] == "user"]
    starts = [i for i in asked if i > lead and messages[i - 1]["role"] != "user"]
    bounds = [lead, *starts, len(messages)]
    return range(lead), [range(a, b) for a, b in pairwise(bounds) if a < b]


def part_of(document: Document, head: range, exchanges: list[range]) -> Document:
    """A conversation of some exchanges, with the images that they show."""
    kept = [*head, *(i for exchange in exchanges for i in exchange)]
    if not document.images:
        return replace(document, messages=tuple(document.messages[i] for i in kept))
    document = with_places(document)
    images: list[Any] = []
    for i in kept:
        before = places_of(document.messages[:i])
        images += document.images[before : before + places_of(document.messages[i : i + 1])]
    messages = tuple(document.messages[i] for i in kept)
    return replace(document, messages=messages, images=tuple(images))
