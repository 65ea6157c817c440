"""What a template leaves out, measured: a part that can be changed without a trace is not shown.

One idea: no list of templates and of what each can do. Every part of a conversation is altered, one
at a time, and the text is rendered again; where it stays the same, the student would learn from
less than the data holds, and that is said. Conversations of one shape are measured once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from stillroom.pipeline.corpus.messages import Message
from stillroom.pipeline.corpus.turns import assistant_turns

Context = Mapping[str, Any]
RenderWith = Callable[[Sequence[Message], bool, Context], str]
REASONING = ("reasoning_content", "reasoning", "thinking")
THOUGHT = "</think>"
CHANGE = " x"


def shape(messages: Sequence[Message], context: Context) -> tuple:
    """What decides a template's branches: the roles, the fields and their kinds."""
    shown = tuple(
        (m["role"], *sorted((key, _kind(value)) for key, value in m.items() if key != "role"))
        for m in messages
    )
    return shown, tuple(sorted(name for name, value in context.items() if value))


def dropped(render: RenderWith, messages: Sequence[Message], context: Context) -> list[str]:
    """Parts that the template does not show, such as `tool_calls of message 2`.

    An assistant's message is measured where it is the last, because histories may leave out
    reasoning; every other message where an answer to it is asked for, and in the last history.
    """
    turns = list(assistant_turns(messages))
    found = [
        name for end in turns[:1] if end for name in _of_context(render, messages[:end], context)
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
) -> Iterator[str]:
    """Other messages from `begin` on, and the assistant's message `end` that answers them."""
    others = [at for at in range(begin, end) if messages[at]["role"] != "assistant"]
    if others:
        history = messages[:end]
        yield from _unseen(lambda them: render(them, True, context), history, others)
    yield from _unseen(lambda them: render(them, False, context), messages[: end + 1], [end])


def _unseen(
    render: Callable[[Sequence[Message]], str], messages: Sequence[Message], which: Sequence[int]
) -> Iterator[str]:
    shown = render(messages)
    for at in which:
        for name, other in _altered(messages[at]):
            if _same(render, [*messages[:at], other, *messages[at + 1 :]], shown):
                yield f"{name} of message {at + 1}"


def _same(render: Callable[[Sequence[Message]], str], messages: list[Message], shown: str) -> bool:
    """A template that refuses the altered messages has looked at what was altered."""
    try:
        return render(messages) == shown
    except Exception:  # jinja raises whatever a template author chose
        return False


def _altered(message: Message) -> Iterator[tuple[str, Message]]:
    """Every part of a message that has something in it, and the message with that part changed."""
    content = message.get("content")
    if isinstance(content, str) and content.strip():
        yield "the content", {**message, "content": content + CHANGE}
    elif isinstance(content, list):
        for at, part in enumerate(content):
            others = [*content[:at], *_other_part(part), *content[at + 1 :]]
            yield _part_name(part), {**message, "content": others}
    for name in REASONING:
        if isinstance(message.get(name), str) and message[name].strip():
            yield name, {**message, name: message[name] + CHANGE}
    for at, call in enumerate(message.get("tool_calls") or ()):
        calls = list(message["tool_calls"])
        calls[at] = _other_call(call)
        yield "tool_calls", {**message, "tool_calls": calls}


def _part_name(part: Any) -> str:
    kind = part.get("type", "a part") if isinstance(part, dict) else "a part"
    return "the text" if kind == "text" else f"the {kind}"


def _other_part(part: Any) -> list[Any]:
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return [{**part, "text": part["text"] + CHANGE}]
    return []


def _other_call(call: Any) -> Any:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _other_call(call["function"])}
    return {**call, "name": str(call.get("name", "")) + "x"}


def _of_context(render: RenderWith, history: Sequence[Message], context: Context) -> list[str]:
    """Tools and documents, and whatever else a row gives the template."""
    found = []
    for name, value in context.items():
        other = {key: one for key, one in context.items() if key != name}
        if value and _same(
            lambda them, c=other: render(them, True, c),
            list(history),
            render(history, True, context),
        ):
            found.append(name)
    return found


def _kind(value: Any) -> Any:
    """How a template sees a value without its words: absent, empty, text, parts."""
    if isinstance(value, str):
        return "text" if value.strip() else "blank"
    if isinstance(value, list):
        return tuple(
            part.get("type", "") if isinstance(part, dict) else type(part).__name__
            for part in value
        )
    return type(value).__name__
