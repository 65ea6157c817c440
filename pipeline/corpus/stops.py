"""How a model stops whose turns have no end of their own: it begins the next turn.

One idea: what the template puts between a turn and the message after it is measured by altering the
turn, since all that stays the same behind the change comes after it. Where that begins with a token
that stops generation (GLM's `<|user|>` and `<|observation|>`), the model has to write it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from stillroom.pipeline.corpus.dropping import altered
from stillroom.pipeline.corpus.messages import Message
from stillroom.pipeline.corpus.turns import Ends, Messages, Render, Turn, common_prefix

QUESTIONERS = ("user", "tool")
"""Who speaks after a model that has stopped."""


def stopped(
    render: Render, messages: Messages, made: Turn, ends: Ends, then: Sequence[Message] = ()
) -> Turn:
    """A turn that ends as the model ends it.

    Args:
        render: the template.
        messages: up to the turn or further.
        made: the turn, by the rule.
        ends: tokens of the model.
        then: what follows the turn in the conversation, which may be nothing.
    """
    if made.stops or not ends.declared:
        return made
    upto = messages[: made.index + 1]
    for tail in _tails(render, upto, next_message(upto, then)):
        if stop := _stop(tail, made.said, ends):
            return replace(made, said=made.said + stop, after="", ended=True, stops=True)
    return made


def next_message(upto: Messages, then: Sequence[Message]) -> Message:
    """Who would speak after the last message: whoever does, or a called tool, or the user."""
    last = upto[-1]
    calls = last.get("tool_calls") or ()
    role = then[0]["role"] if then else ""
    role = role if role in QUESTIONERS else "tool" if calls else "user"
    as_parts = any(isinstance(message.get("content"), list) for message in upto)
    content = [{"type": "text", "text": "x"}] if as_parts else "x"
    if role == "user":
        return {"role": role, "content": content}
    call = calls[0] if calls else {}
    name = (call.get("function") or call).get("name", "x")
    return {"role": role, "content": content, "name": name, "tool_call_id": call.get("id", "x")}


def _tails(render: Render, upto: Messages, follows: Message) -> Iterator[str]:
    """What stays the same behind each part of the last message, with the next message there."""
    *history, last = upto
    try:
        shown = render([*upto, follows], False)
    except Exception:  # whatever a template raises; it has no such message
        return
    for other in ({"": {**last, "content": "x"}} | dict(altered(last))).values():
        try:
            changed = render([*history, other, follows], False)
        except Exception:  # as above
            continue
        if changed != shown:
            same = common_prefix(shown[::-1], changed[::-1])
            yield shown[len(shown) - same :]


def _stop(tail: str, said: str, ends: Ends) -> str:
    """What stands between a turn's end and the end of the first token there that stops."""
    for start, token in ends.places(tail):
        rest = tail[:start].rstrip()
        if said.endswith(rest):
            return tail[len(rest) : start + len(token)]
    return ""
