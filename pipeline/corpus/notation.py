"""What a template writes in Python's own notation, measured: `None`, `[{'type': 'text'}]`.

One idea: a template that prints a value which is no text shows it, but as no model was taught to
read or write it. Values are replaced by equal ones that print as a sign, and the sign is looked
for; a null has no equal, and its name is counted.
"""

from collections.abc import Callable, Sequence
from typing import Any

from stillroom.pipeline.corpus.messages import Message, content_not_null

Render = Callable[[Sequence[Message]], str]
SIGN = "\ue83a"
"""A character for private use."""


class _Signed:
    def __str__(self) -> str:
        return SIGN

    __repr__ = __str__


class _List(_Signed, list):
    """A list that prints as the sign."""


class _Object(_Signed, dict):
    """An object that prints as the sign."""


def signed(value: Any) -> Any:
    """An equal value whose lists and objects print as the sign, at every depth."""
    if isinstance(value, dict):
        return _Object({key: signed(one) for key, one in value.items()})
    return _List(map(signed, value)) if isinstance(value, list) else value


def in_python(render: Render, messages: Sequence[Message], field: str) -> bool:
    """Whether a list or an object in a field of the messages comes out in Python's notation."""
    changed = ({**m, field: signed(m[field])} if field in m else m for m in messages)
    return SIGN in render(list(changed))


def writes_none(render: Render, messages: Sequence[Message]) -> bool:
    """Whether a content that is null comes out as the word None."""
    if all(message.get("content", "") is not None for message in messages):
        return False
    try:
        other = render(content_not_null(messages))
    except Exception:  # a template that needs the null looks at it, and does not print it
        return False
    return render(messages).count(str(None)) > other.count(str(None))
