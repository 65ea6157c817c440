"""Messages as people have them, made into messages as templates take them.

One idea: what a file format did to a conversation is undone here (calls as JSON text, fields that
Arrow filled with nulls, flags for trainers), and nothing else is changed. Which turns are taught
and what a template can show are decided elsewhere.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.config.strict import nearest

Message = dict[str, Any]
SAYING = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Fields with which a message needs no content."""
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
FLAGS = ("weight", "train", "training")
"""Keys that say whether an assistant's message is to be learned; no template sees them."""


def cleaned(messages: Sequence[Message], arrow: bool = False) -> tuple[Message, ...]:
    """Messages without what only their file put there.

    A field that is null is absent, except `content`, which templates ask for; deeper nulls stay
    where a person wrote them. Calls are objects, and so are their arguments.

    Args:
        messages: each with a `role`.
        arrow: the nulls at every depth are Arrow's, which gives all structs the same fields.

    Raises:
        CorpusError: calls or arguments are no JSON.
    """
    return tuple(_cleaned(message, arrow, at) for at, message in enumerate(messages, start=1))


def without_nulls(value: Any) -> Any:
    """A value without the null fields of its objects, at every depth."""
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def decoded(value: Any, what: str) -> Any:
    """A value that may be written as JSON text.

    Raises:
        CorpusError: it is text, and no JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{what} are text that is not JSON ({error})") from None


def taught(messages: Sequence[Message]) -> list[bool]:
    """Whether each message is one to learn: every assistant's, unless its flag says no.

    Raises:
        CorpusError: a weight between: rows of a cache are learned or not.
    """
    return [m["role"] == "assistant" and _flag(m, at) for at, m in enumerate(messages, start=1)]


def check_roles(messages: Sequence[Message], template: str) -> None:
    """Refuse roles that are nobody's: an answer under a misspelled one would not be learned.

    Args:
        messages: of a conversation.
        template: text of the chat template; a role that it names is its own.

    Raises:
        CorpusError: there is one.
    """
    for at, message in enumerate(messages, start=1):
        role = message["role"]
        if role not in ROLES and role not in template:
            raise CorpusError(
                f"message {at} has the role '{role}', which the chat template does not name",
                expected=f"one of {', '.join(ROLES)}",
                remedy=nearest(role, ROLES),
            )


def unflagged(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Messages without the flags that `taught` reads."""
    return tuple({k: v for k, v in m.items() if k not in FLAGS} for m in messages)


def _flag(message: Message, at: int) -> bool:
    given = [(name, message[name]) for name in FLAGS if message.get(name) is not None]
    for name, value in given:
        if value not in (0, 1):
            raise CorpusError(
                f"message {at} has {name} = {value!r}",
                expected="0 or 1 (false or true)",
                remedy="Leave messages out with 0; documents are weighed in training.",
            )
    return all(value for _, value in given)


def _cleaned(message: Message, arrow: bool, at: int) -> Message:
    kept = {k: v for k, v in message.items() if v is not None or k == "content"}
    if arrow:
        kept = {key: without_nulls(value) for key, value in kept.items()}
    elif isinstance(content := kept.get("content"), list):
        kept["content"] = [_present(part) for part in content]
    if "function_call" in kept and "tool_calls" not in kept:
        kept["tool_calls"] = [{"type": "function", "function": kept.pop("function_call")}]
    calls = decoded(kept.pop("tool_calls", None), f"the tool_calls of message {at}")
    return {**kept, "tool_calls": list(_calls(calls, at))} if calls else kept


def _present(part: Any) -> Any:
    """A part of a content without its null fields, which templates take for present."""
    if not isinstance(part, dict):
        return part
    return {key: value for key, value in part.items() if value is not None}


def _calls(calls: Any, at: int) -> Iterator[Any]:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise CorpusError(f"the tool_calls of message {at} are no list of objects")
    for call in calls:
        function = call.get("function")
        if isinstance(function, dict):
            yield {**call, "function": _with_arguments(function, at)}
        else:
            yield _with_arguments(call, at)


def _with_arguments(call: dict[str, Any], at: int) -> dict[str, Any]:
    if not isinstance(call.get("arguments"), str):
        return call
    what = f"the arguments of a call in message {at}"
    return {**call, "arguments": decoded(call["arguments"], what) or {}}


def arguments_as_text(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Calls with their arguments as JSON text, for templates that join it to other text."""

    def spelled(call: Any) -> Any:
        if isinstance(call.get("function"), dict):
            return {**call, "function": spelled(call["function"])}
        given = call.get("arguments")
        as_text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        return {**call, "arguments": as_text}

    return tuple(
        {**m, "tool_calls": [spelled(call) for call in m["tool_calls"]]}
        if m.get("tool_calls")
        else m
        for m in messages
    )


def content_as_parts(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Texts as lists of one part, for templates that only know parts."""
    return tuple(
        {**m, "content": [{"type": "text", "text": m["content"]}]}
        if isinstance(m.get("content"), str)
        else m
        for m in messages
    )


def content_as_text(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Lists of text parts as one text, and what a tool gave as JSON text, for templates that only
    know text."""
    return tuple({**m, "content": _as_text(m)} if "content" in m else m for m in messages)


def _as_text(message: Message) -> Any:
    content = message["content"]
    if _only_text(content):
        return "".join(part["text"] for part in content)
    if message["role"] == "tool" and isinstance(content, (dict, list)) and not _parts(content):
        return json.dumps(content, ensure_ascii=False)
    return content


def _parts(content: Any) -> bool:
    """Whether a content is a list of parts."""
    return isinstance(content, list) and all(isinstance(p, dict) and "type" in p for p in content)


def content_not_null(messages: Sequence[Message]) -> tuple[Message, ...]:
    """An empty text where there is no content, for templates that take text from everybody."""
    return tuple({**m, "content": ""} if m.get("content") is None else m for m in messages)


def _only_text(content: Any) -> bool:
    return _parts(content) and all(
        part["type"] == "text" and isinstance(part.get("text"), str) for part in content
    )
