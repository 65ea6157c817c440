"""Conversations as other people's formats write them, as messages.

One idea: one function for each way of writing a conversation down, from values to messages with
roles that templates know. Which column is which, and what templates make of it, is not decided
here.
"""

import json
from collections.abc import Sequence
from typing import Any

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.config.strict import nearest
from stillroom.pipeline.corpus.documents import Row
from stillroom.pipeline.corpus.images import caption_messages
from stillroom.pipeline.corpus.messages import FLAGS, Message, decoded

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
    "function_call": "assistant",
}
"""ShareGPT's names and those of its relatives."""


def as_list(value: Any) -> Any:
    """A list that may be written as JSON text, and anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def is_messages(value: Any) -> bool:
    """Whether a value is a list of `{"role", "content"}`."""
    return _all_have(value, "role")


def is_sharegpt(value: Any) -> bool:
    """Whether a value is a list of `{"from", "value"}`."""
    return _all_have(value, "from")


def messages(value: Any, column: str) -> tuple[Message, ...]:
    """A list of messages, or its JSON text.

    Raises:
        CorpusError: it is neither.
    """
    found = decoded(value, f"the messages in column '{column}'")
    if found is not None and not (found == [] or is_messages(found)):
        raise CorpusError(
            f"column '{column}' is not a list of chat messages",
            expected='[{"role": "user", "content": "..."}, ...]',
        )
    return tuple(found or ())


def sharegpt(value: Any, column: str) -> tuple[Message, ...]:
    """A list of `{"from", "value"}`, or its JSON text.

    Raises:
        CorpusError: it is neither, or a role is not known.
    """
    found = decoded(value, f"the conversations in column '{column}'")
    if found is not None and not (found == [] or is_sharegpt(found)):
        raise CorpusError(
            f"column '{column}' is not a list of ShareGPT messages",
            expected='[{"from": "human", "value": "..."}, ...]',
        )
    return tuple(_from_value(message) for message in found or ())


def alpaca(row: Row) -> tuple[Message, ...]:
    """Instruction, input and output as a question and its answer; earlier ones in `history`."""
    values = row.values
    asked = "\n\n".join(filter(None, (_text(row, "instruction"), values.get("input"))))
    earlier = [turn for pair in values.get("history") or () for turn in _pair(*pair)]
    return (*earlier, *_pair(asked, _text(row, "output")))


def question_and_answer(row: Row, asked: str, said: str) -> tuple[Message, ...]:
    """Two columns, each a text or a list of messages.

    Raises:
        CorpusError: one is missing, or something else.
    """
    return (*_side(row, asked, "user"), *_side(row, said, "assistant"))


def chosen(value: Any, row: Row) -> tuple[Message, ...]:
    """The answer that was preferred, after its prompt; conversations that hold it stand alone."""
    answer = as_list(value)
    whole = is_messages(answer) and any(message["role"] == "user" for message in answer)
    prompt = () if whole or row.values.get("prompt") is None else _side(row, "prompt", "user")
    return (*prompt, *_side(row, "chosen", "assistant"))


def captions(value: Any) -> tuple[Message, ...]:
    """A caption as the answer to its image.

    Raises:
        CorpusError: it is no text.
    """
    if not isinstance(value, str):
        raise CorpusError(f"a caption is {type(value).__name__}", expected="text")
    return caption_messages(value)


def _side(row: Row, column: str, role: str) -> Sequence[Message]:
    found = as_list(row.values.get(column))
    if is_messages(found):
        return found
    return ({"role": role, "content": _text(row, column)},)


def _text(row: Row, column: str) -> str:
    if column not in row.values:
        known = ", ".join(sorted(row.values))
        raise CorpusError(f"no column '{column}'", expected=f"one of {known}")
    found = row.values[column]
    if not isinstance(found, str):
        kind = type(found).__name__
        raise CorpusError(f"column '{column}' holds {kind}", expected="text")
    return found


def _pair(asked: str, said: str) -> tuple[Message, Message]:
    return {"role": "user", "content": asked}, {"role": "assistant", "content": said}


def _from_value(message: dict[str, Any]) -> Message:
    named = message["from"]
    if named not in ROLES:
        raise CorpusError(
            f"a message is from '{named}'",
            expected=f"one of {', '.join(ROLES)}",
            remedy=nearest(named, ROLES),
        )
    flags = {name: message[name] for name in FLAGS if name in message}
    if named == "function_call":
        call = decoded(message.get("value"), "the arguments of a function_call")
        calls = call if isinstance(call, list) else [call]
        wrapped = [{"type": "function", "function": one} for one in calls]
        return {"role": "assistant", "content": "", "tool_calls": wrapped, **flags}
    return {"role": ROLES[named], "content": message.get("value"), **flags}


def _all_have(value: Any, key: str) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, dict) and isinstance(one.get(key), str) for one in value)
    )
