"""Conversations as other people's formats write them, as messages.

One idea: one function for each way of writing a conversation down, from values to messages with
roles that templates know. Which column is which, and what templates make of it, is not decided
here.
"""

import json
from typing import Any

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.config.strict import nearest
from stillroom.pipeline.corpus.documents import Row
from stillroom.pipeline.corpus.images import caption_messages
from stillroom.pipeline.corpus.messages import FLAGS, SAYING, Message, decoded

ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
    "function_call": "assistant",
}
"""ShareGPT's names and those of its relatives, in small letters."""
CONTENTS = ("content", "value", "text")


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
    return tuple(_from_role(message, at) for at, message in enumerate(found or (), start=1))


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
    return tuple(_from_value(message, at) for at, message in enumerate(found or (), start=1))


def alpaca(row: Row, given: str = "input", said: str = "output") -> tuple[Message, ...]:
    """Instruction, input and output as a question and its answer; earlier ones in `history`.

    Raises:
        CorpusError: one is no text, or the history no list of pairs of texts.
    """
    more = _text(row, given) if row.values.get(given) is not None else ""
    asked = "\n\n".join(filter(None, (_text(row, "instruction"), more)))
    earlier = as_list(row.values.get("history")) or ()
    if not all(map(_is_pair, earlier)):
        raise CorpusError("column 'history' is no list of questions with their answers")
    turns = [turn for pair in earlier for turn in _pair(*pair)]
    return (*turns, *_pair(asked, _text(row, said)))


def question_and_answer(row: Row, asked: str, said: str, given: str = "") -> tuple[Message, ...]:
    """Two columns, each a text or messages; an answer with the label false is not learned. What is
    `given` with a question stands before it, an empty line between them, as SQuAD's passages do.

    Raises:
        CorpusError: one is missing, or something else.
    """
    answer = _side(row, said, "assistant")
    if row.values.get("label") is False:
        answer = tuple({**message, "weight": 0} for message in answer)
    question = _side(row, asked, "user")
    return (*(_after(_text(row, given), question) if row.values.get(given) else question), *answer)


def chosen(row: Row, asked: str) -> tuple[Message, ...]:
    """The answer that was preferred, after its prompt; conversations that hold it stand alone.

    Raises:
        CorpusError: it is neither text nor messages; or a text that nothing asks for.
    """
    answer = _side(row, "chosen", "assistant")
    if any(message["role"] == "user" for message in answer):
        return answer
    if row.values.get(asked) is None:
        raise CorpusError(
            "an answer in column 'chosen' without what was asked",
            expected="a column 'prompt', or messages with the user's in 'chosen'",
        )
    return (*_side(row, asked, "user"), *answer)


def captions(value: Any) -> tuple[Message, ...]:
    """A caption as the answer to its image.

    Raises:
        CorpusError: it is no text.
    """
    if not isinstance(value, str):
        raise CorpusError(f"a caption is {type(value).__name__}", expected="text")
    return caption_messages(value)


def _side(row: Row, column: str, role: str) -> tuple[Message, ...]:
    found = as_list(row.values.get(column))
    listed = [found] if isinstance(found, dict) else found
    if is_messages(listed):
        return messages(listed, column)
    if is_sharegpt(listed):
        return sharegpt(listed, column)
    return ({"role": role, "content": _text(row, column)},)


def _after(given: str, question: tuple[Message, ...]) -> tuple[Message, ...]:
    if len(question) != 1 or not isinstance(question[0]["content"], str):
        raise CorpusError(
            "a context beside a question of several messages or parts",
            expected="a context and a question that are both plain text",
            remedy="Write the context into the messages, and drop its column.",
        )
    return ({**question[0], "content": f"{given}\n\n{question[0]['content']}"},)


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


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, (list, tuple)) and [type(one) for one in pair] == [str, str]


def _from_role(message: dict[str, Any], at: int) -> Message:
    named = message["role"]
    role = named if named in ("function", "tool") else ROLES.get(named.strip().lower(), named)
    if any(message.get(name) for name in SAYING):
        return {**message, "role": role}
    kept = {key: one for key, one in message.items() if key not in CONTENTS}
    return {**kept, "role": role, "content": _content(message, at)}


def _from_value(message: dict[str, Any], at: int) -> Message:
    named = message["from"].strip().lower()
    if named not in ROLES:
        raise CorpusError(
            f"message {at} is from '{message['from']}'",
            expected=f"one of {', '.join(ROLES)}",
            remedy=nearest(named, ROLES),
        )
    flags = {name: message[name] for name in (*FLAGS, *SAYING) if name in message}
    said = None if any(message.get(name) for name in SAYING) else _content(message, at)
    if named == "function_call":
        call = decoded(said, "the arguments of a function_call")
        calls = call if isinstance(call, list) else [call]
        wrapped = [{"type": "function", "function": one} for one in calls]
        return {"role": "assistant", "content": "", "tool_calls": wrapped, **flags}
    said = message.get("value") if said is None else said
    return {"role": ROLES[named], "content": said, **flags}


def _content(message: dict[str, Any], at: int) -> Any:
    """What a message says, whatever its field is called.

    Raises:
        CorpusError: it has no such field.
    """
    named = [name for name in CONTENTS if name in message]
    if not named:
        found = f"message {at} says nothing: it has {', '.join(message)}"
        raise CorpusError(found, expected=f"one of {', '.join(CONTENTS)}")
    filled = (message[name] for name in named if message[name] is not None)
    return next(filled, None)


def _all_have(value: Any, key: str) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, dict) and isinstance(one.get(key), str) for one in value)
    )
