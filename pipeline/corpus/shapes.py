"""What of a conversation decides a template's branches, and the shortest conversation that has it.

One idea: a template sees roles, fields and kinds of values; words and numbers of repetitions change
nothing. So what was measured on one conversation holds for all of its shape, and a long one is
measured without the middle of its repetitions. What is measured is not known here.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, TypeVar

from stillroom.pipeline.corpus.messages import Message

Context = Mapping[str, Any]
Piece = TypeVar("Piece")


def gist(messages: Sequence[Message]) -> list[int]:
    """Indices of the messages that stay when only the first two and the last of equal steps, and of
    equal exchanges, do. A step ends with an assistant's message; an exchange begins with a user's.
    """
    kinds = [kind_of_message(message) for message in messages]

    def of_all(places: Sequence[int]) -> Hashable:
        return tuple(kinds[at] for at in places)

    steps = _parts(range(len(messages)), lambda at: at and messages[at - 1]["role"] == "assistant")
    few = [at for step in _thinned(steps, of_all) for at in step]
    exchanges = _parts(few, lambda at: messages[at]["role"] == "user")
    return [at for exchange in _thinned(exchanges, of_all) for at in exchange]


def shape(messages: Sequence[Message], context: Context) -> Hashable:
    """What decides a template's branches: the roles, the fields and their kinds."""
    given = tuple(sorted(name for name, value in context.items() if value))
    return tuple(map(kind_of_message, messages)), given


def kind_of_message(message: Message) -> Hashable:
    """A message without its words."""
    fields = sorted((key, _kind(value)) for key, value in message.items() if key != "role")
    return message["role"], *fields


def _parts(places: Sequence[int], begins: Callable[[int], Any]) -> list[list[int]]:
    """Runs of places, each of which but the first starts where something begins."""
    parts: list[list[int]] = []
    for at in places:
        if not parts or begins(at):
            parts.append([])
        parts[-1].append(at)
    return parts


def _thinned(parts: list[Piece], key: Callable[[Piece], Hashable]) -> list[Piece]:
    """Parts without the middle of every run of equal ones."""
    runs = (list(run) for _, run in groupby(parts, key))
    return [one for run in runs for one in (run if len(run) < 4 else [*run[:2], run[-1]])]


def _kind(value: Any) -> Any:
    """How a template sees a value without its words: absent, empty, text, parts."""
    if isinstance(value, str):
        return "text" if value.strip() else "blank"
    if isinstance(value, list):
        return tuple(map(_kind_of_part, value))
    return _kind_of_part(value)


def _kind_of_part(part: Any) -> Hashable:
    """A part of a content by its type, a call by the kinds of its arguments."""
    if not isinstance(part, dict):
        return type(part).__name__
    return part.get("type", ""), frozenset(_kinds_within(part))


def _kinds_within(value: Any) -> Iterator[str]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for one in inner:
        yield type(one).__name__
        yield from _kinds_within(one)
