"""The same conversation in the spelling that a template takes.

One idea: templates differ in whether a call's arguments are an object or text, a message's content
text or parts, and in whether a content may be null. Spellings are tried in a fixed order, and the
first that the template renders whole is the conversation's; where none is, the first one's refusal
is told. Conversations of one shape are tried once.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.corpus.dropping import (
    Context,
    RenderWith,
    dropped,
    shape,
    thought_dropped,
)
from stillroom.pipeline.corpus.messages import (
    Message,
    arguments_as_text,
    content_as_parts,
    content_as_text,
    content_not_null,
)

Spell = Callable[[Sequence[Message]], Sequence[Message]]
KEPT_SHAPES = 4096


NULLS: tuple[Spell, ...] = (tuple, content_not_null)
ARGUMENTS: tuple[Spell, ...] = (tuple, arguments_as_text)
CONTENTS: tuple[Spell, ...] = (tuple, content_as_text, content_as_parts)
SPELLINGS = tuple(product(CONTENTS, ARGUMENTS, NULLS))
"""One way each of writing contents, arguments and nulls; as the conversation is written first."""


class Spelling:
    """Spells conversations for one template.

    Args:
        render: the template.
        notes: counts turns whose reasoning the template leaves out.
    """

    def __init__(self, render: RenderWith, notes: Counter[str]):
        self._render, self._notes = render, notes
        self._known: dict[tuple, Spell] = {}

    def messages(self, messages: Sequence[Message], context: Context) -> Sequence[Message]:
        """Messages, the last of them the assistant's, as the template shows all of them.

        Raises:
            CorpusError: it leaves something out in every spelling.
            Exception: whatever it raises in the first spelling, if it raises in all.
        """
        key = shape(messages, context)
        if key not in self._known:
            if len(self._known) == KEPT_SHAPES:
                self._known.clear()
            self._known[key] = self._first(messages, context)
        spelled = self._known[key](messages)
        self._notes["answers_whose_thoughts_the_template_drops"] += thought_dropped(
            self._render, spelled, context
        )
        return spelled

    def prompt(self, messages: Sequence[Message], context: Context) -> str:
        """The text that asks for an answer to messages.

        Raises:
            Exception: whatever the template raises in the first spelling, if it raises in all.
        """
        refusals: list[Exception] = []
        for spelled in _distinct(messages):
            try:
                return self._render(spelled(messages), True, context)
            except Exception as error:  # jinja raises whatever a template author chose
                refusals.append(error)
        raise refusals[0]

    def _first(self, messages: Sequence[Message], context: Context) -> Spell:
        refusals: list[Exception] = []
        for spell in _distinct(messages):
            try:
                lost = dropped(self._render, spell(messages), context)
            except Exception as error:  # jinja raises whatever a template author chose
                refusals.append(error)
                continue
            if not lost:
                return spell
            refusals.append(_left_out(lost))
        lossy = (error for error in refusals if isinstance(error, CorpusError))
        raise next(lossy, refusals[0])


def _distinct(messages: Sequence[Message]) -> Iterator[Spell]:
    """The spellings that differ for these messages."""
    seen: list[Sequence[Message]] = []
    for ways in SPELLINGS:
        spell = partial(_spelled, ways)
        if (spelled := spell(messages)) not in seen:
            seen.append(spelled)
            yield spell


def _spelled(ways: tuple[Spell, ...], messages: Sequence[Message]) -> Sequence[Message]:
    for way in ways:
        messages = way(messages)
    return tuple(messages)


def _left_out(lost: list[str]) -> CorpusError:
    names = sorted({name.split(" of ")[0] for name in lost if not name.startswith("the ")})
    remedy = "Give a template that does ([prepare] chat_template)"
    remedy += f", or leave them out by name ([prepare] leave_out = {names})." if names else "."
    found = f"the chat template does not show {', '.join(dict.fromkeys(lost))}"
    return CorpusError(found, remedy=remedy.replace("'", '"'))
