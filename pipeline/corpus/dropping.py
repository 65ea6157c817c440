"""What a template leaves out, measured: a part that can be changed without a trace is not shown.

One idea: no list of templates and of what each can do. Every part of a conversation is altered, one
at a time, and the text is rendered again; where it stays the same, the student would learn from
less than the data holds, and that is said. Which conversations are measured is not decided here.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from stillroom.pipeline.corpus.messages import Message
from stillroom.pipeline.corpus.shapes import Context
from stillroom.pipeline.corpus.turns import assistant_turns

Lost = tuple[str, int | None]
"""A part, and the index of its message; None for what a row gives beside its messages."""
RenderWith = Callable[[Sequence[Message], bool, Context], str]
REASONING = ("reasoning_content", "reasoning", "thinking")
THOUGHT = "</think>"
CHANGE = " x"
EXACT = 1 << 50
"""Below this a number and the next one are written differently."""


def dropped(render: RenderWith, messages: Sequence[Message], context: Context) -> list[Lost]:
    """Parts that the template does not show, such as `("tool_calls", 1)`.

    An assistant's message is measured where it is the last, because histories may leave out
    reasoning; every other message where an answer to it is asked for, and in the last history.
    """
    turns = list(assistant_turns(messages))
    found: list[Lost] = [
        (name, None)
        for end in turns[:1]
        if end
        for name in _of_context(render, messages[:end], context)
    ]
    begin = 0
    for end in turns:
        begin = 0 if end == turns[-1] else begin
        found += _of_turn(render, messages, begin, end, context)
        begin = end + 1
    return found


def thought_dropped(render: RenderWith, messages: Sequence[Message], context: Context) -> bool:
    """Whether reasoning inside the content (`... </think>`) is left out of the last message."""
    content = messages[-1].get("content")
    if not isinstance(content, str) or THOUGHT not in content:
        return False
    other = content.replace(THOUGHT, CHANGE + THOUGHT, 1)
    changed = [*messages[:-1], {**messages[-1], "content": other}]
    return render(messages, False, context) == render(changed, False, context)


def _of_turn(
    render: RenderWith, messages: Sequence[Message], begin: int, end: int, context: Context
) -> Iterator[Lost]:
    """Other messages from `begin` on, and the assistant's message `end` that answers them."""
    others = [at for at in range(begin, end) if messages[at]["role"] != "assistant"]
    if others:
        history = messages[:end]
        yield from _unseen(lambda them: render(them, True, context), history, others)
    yield from _unseen(lambda them: render(them, False, context), messages[: end + 1], [end])


def _unseen(
    render: Callable[[Sequence[Message]], str], messages: Sequence[Message], which: Sequence[int]
) -> Iterator[Lost]:
    shown = render(messages)
    for at in which:
        for name, other in altered(messages[at]):
            if _same(render, [*messages[:at], other, *messages[at + 1 :]], shown):
                yield name, at


def _same(render: Callable[[Sequence[Message]], str], messages: list[Message], shown: str) -> bool:
    """A template that refuses the altered messages has looked at what was altered."""
    try:
        return render(messages) == shown
    except Exception:  # jinja raises whatever a template author chose
        return False


def altered(message: Message) -> Iterator[tuple[str, Message]]:
    """Every part of a message that has something in it, and the message with that part changed."""
    for name, content in _other_contents(message.get("content")):
        yield name, {**message, "content": content}
    for name in REASONING:
        if isinstance(message.get(name), str) and message[name].strip():
            yield name, {**message, name: message[name] + CHANGE}
    for calls in _one_other(message.get("tool_calls") or [], _other_name):
        yield "tool_calls", {**message, "tool_calls": calls}


def arguments_dropped(render: RenderWith, messages: Sequence[Message], context: Context) -> bool:
    """Whether an argument of a call can be changed without a trace in its turn."""
    for end in assistant_turns(messages):
        last, history = messages[end], messages[:end]
        others = _one_other(last.get("tool_calls") or [], _other_arguments)
        changed_turns = [[*history, {**last, "tool_calls": calls}] for calls in others]
        if not changed_turns:
            continue
        shown = render(messages[: end + 1], False, context)
        if any(_same(lambda them: render(them, False, context), m, shown) for m in changed_turns):
            return True
    return False


def _one_other(calls: list[Any], others: Callable[[Any], Iterator[Any]]) -> Iterator[list[Any]]:
    """Calls with one of them changed, in each way."""
    for at, call in enumerate(calls):
        for other in _inside(call, others):
            yield [*calls[:at], other, *calls[at + 1 :]]


def _inside(call: Any, others: Callable[[Any], Iterator[Any]]) -> Iterator[Any]:
    if not isinstance(call.get("function"), dict):
        return others(call)
    return ({**call, "function": other} for other in others(call["function"]))


def _other_name(call: Any) -> Iterator[Any]:
    yield {**call, "name": str(call.get("name", "")) + "x"}


def _other_arguments(call: Any) -> Iterator[Any]:
    return ({**call, "arguments": other} for other in changed(call.get("arguments")))


def _other_contents(content: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(content, list):
        yield from (("the content", other) for other in changed(content))
        return
    for at, part in enumerate(content):
        for other in _other_parts(part):
            yield _part_name(part), [*content[:at], *other, *content[at + 1 :]]


def _part_name(part: Any) -> str:
    kind = part.get("type", "a part") if isinstance(part, dict) else "a part"
    return "the text" if kind == "text" else f"the {kind}"


def _other_parts(part: Any) -> Iterator[list[Any]]:
    """What may stand in the place of a part: a text with other words, and nothing for a picture."""
    if not isinstance(part, dict) or "type" not in part:
        yield from ([other] for other in changed(part))
    elif isinstance(part.get("text"), str):
        yield [{**part, "text": part["text"] + CHANGE}]
    else:
        yield []


def changed(value: Any) -> Iterator[Any]:
    """For each text, number and truth in a value: the value with that one changed."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from ({**value, key: other} for other in changed(inner))
    elif isinstance(value, list):
        for at, inner in enumerate(value):
            yield from ([*value[:at], other, *value[at + 1 :]] for other in changed(inner))
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, (int, float)):
        yield value + 1 if abs(value) < EXACT else 0
    elif isinstance(value, str) and value.strip():
        yield value + CHANGE


def _of_context(render: RenderWith, history: Sequence[Message], context: Context) -> list[str]:
    """Tools and documents, each by itself, and whatever else a row gives the template."""
    shown = render(history, True, context)
    return [
        name
        for name, value in context.items()
        if any(
            _same(lambda them, c=other: render(them, True, c), list(history), shown)
            for other in _without(context, name, value)
        )
    ]


def _without(context: Context, name: str, value: Any) -> Iterator[Context]:
    """What a row gives without one of its values, or without one element of that."""
    if isinstance(value, list):
        for at in range(len(value)):
            yield {**context, name: [*value[:at], *value[at + 1 :]]}
    elif value:
        yield {key: one for key, one in context.items() if key != name}
