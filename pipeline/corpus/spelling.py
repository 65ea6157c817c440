"""The same conversation in the spelling that a template takes.

One idea: templates differ in whether a call's arguments are an object or text, a message's content
text or parts, and in whether a content may be null. Spellings are tried in a fixed order, and the
first that the template renders whole, and never in Python's notation, is the conversation's; where
none is, the first one's refusal is told. Conversations of one shape are tried once.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from itertools import product

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.corpus.dropping import (
    Lost,
    RenderWith,
    arguments_dropped,
    dropped,
    thought_dropped,
)
from stillroom.pipeline.corpus.messages import (
    Message,
    arguments_as_text,
    content_as_parts,
    content_as_text,
    content_not_null,
)
from stillroom.pipeline.corpus.notation import in_python, writes_none
from stillroom.pipeline.corpus.shapes import Context, gist, shape

Spell = Callable[[Sequence[Message]], Sequence[Message]]
Flaws = tuple[str, ...]
"""Names of what is counted."""
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
        notes: counts turns whose reasoning the template leaves out, and conversations with flaws.
    """

    def __init__(self, render: RenderWith, notes: Counter[str]):
        self._render, self._notes = render, notes
        self._known: dict[Hashable, tuple[Spell, Flaws]] = {}

    def messages(self, messages: Sequence[Message], context: Context) -> Sequence[Message]:
        """Messages, the last of them the assistant's, as the template shows all of them.

        Raises:
            CorpusError: it leaves something out in every spelling.
            Exception: whatever it raises in the first spelling, if it raises in all.
        """
        places = gist(messages)
        few = [messages[at] for at in places]
        key = shape(few, context)
        if key not in self._known:
            if len(self._known) == KEPT_SHAPES:
                self._known.clear()
            self._known[key] = self._first(few, context, places)
        spell, flaws = self._known[key]
        spelled = spell(messages)
        self._notes.update(flaws)
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

    def _first(
        self, messages: Sequence[Message], context: Context, places: Sequence[int]
    ) -> tuple[Spell, Flaws]:
        """The spelling of messages that stand at some places of a conversation, and its flaws."""
        refusals: list[Exception] = []
        second: list[tuple[Spell, Flaws]] = []
        for spell in _distinct(messages):
            try:
                problem = self._problem(spell(messages), context, places)
                flaws = () if problem else self._flaws(spell(messages), context)
            except Exception as error:  # jinja raises whatever a template author chose
                problem, flaws = error, ()
            if problem is None and not flaws:
                return spell, ()
            if problem is None:
                second.append((spell, flaws))
            else:
                refusals.append(problem)
        if second:
            return second[0]
        lossy = (error for error in refusals if isinstance(error, CorpusError))
        raise next(lossy, refusals[0])

    def _problem(
        self, messages: Sequence[Message], context: Context, places: Sequence[int]
    ) -> CorpusError | None:
        """Why messages cannot be spelled so, beside what the template itself refuses."""
        if lost := dropped(self._render, messages, context):
            return _left_out([(name, None if at is None else places[at]) for name, at in lost])

        def render(them: Sequence[Message]) -> str:
            return self._render(them, False, context)

        if in_python(render, messages, "content") or writes_none(render, messages):
            return CorpusError(
                "the chat template writes a content in Python's notation",
                expected="a text, or a list of parts with a type",
                remedy="Write it as text, or give a template that does ([prepare] chat_template).",
            )
        return None

    def _flaws(self, messages: Sequence[Message], context: Context) -> Flaws:
        """What is told of a spelling that shows every part."""
        flaws = []
        if arguments_dropped(self._render, messages, context):
            flaws.append("conversations_whose_arguments_the_template_drops")
        # Right for templates that teach models to call as in Python (LFM2).
        if in_python(lambda them: self._render(them, False, context), messages, "tool_calls"):
            flaws.append("conversations_with_calls_in_pythons_notation")
        return tuple(flaws)


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


def _left_out(lost: Sequence[Lost]) -> CorpusError:
    names = sorted({name for name, _ in lost if not name.startswith("the ")})
    remedy = "Give a template that does ([prepare] chat_template)"
    remedy += f", or leave them out by name ([prepare] leave_out = {names})." if names else "."
    parts = (name if at is None else f"{name} of message {at + 1}" for name, at in lost)
    found = f"the chat template does not show {', '.join(dict.fromkeys(parts))}"
    return CorpusError(found, remedy=remedy.replace("'", '"'))
