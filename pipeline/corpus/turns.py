"""The rule of the mask: what an assistant turn is asked with, and what the model writes to it.

One idea: the history is rendered with the generation prompt, and once more with the turn. What the
second rendering has beyond the first, up to the turn's end, is what the model would have to write
at inference; nothing is ever looked for in a text. Rendering and tokens are not known here.

Where the two part ways before the first one ends (a prompt that opens `<think>`, a finished turn
that lacks it), the prompt stays as inference has it, and the turn goes on where they parted.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from stillroom.cache_schemas.errors import CorpusError

Messages = Sequence[dict[str, Any]]
Render = Callable[[Messages, bool], str]
"""(messages, whether the generation prompt follows) -> text."""
Choice = Literal["auto", "together", "each", "last"]

_PIECE = re.compile(r"<[^<>\s]*>|\[[^\[\]\s]*\]|[^\s<\[]+|[<\[]")
"""A tag or a word of a generation prompt: it is there as a whole, or not at all."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One assistant turn.

    Attributes:
        index: of its message.
        prompt: the text before it: the history, and what asks for an answer.
        said: what the model writes, up to and including the turn's end.
        after: what the template adds behind the end; read, and not a target.
        ended: whether it ends with a special token.
        stops: whether that is one that stops generation, so that stopping is learned.
        contradicted: the prompt closed a block (`</think>`) that the turn fills: the turn is shown
            as the template finishes it, and not after this prompt.
    """

    index: int
    prompt: str
    said: str
    after: str = ""
    ended: bool = True
    stops: bool = True
    contradicted: bool = False

    @property
    def text(self) -> str:
        return self.prompt + self.said

    @property
    def span(self) -> tuple[int, int]:
        return len(self.prompt), len(self.prompt) + len(self.said)


@dataclass(frozen=True, slots=True)
class Shown:
    """One example as text: all turns but the last are there as the last one's history has them.

    Attributes:
        text: prompt and answer of the last turn, and what the template adds.
        turns: those whose answers are targets here, in order.
    """

    text: str
    turns: tuple[Turn, ...]

    @property
    def upto(self) -> int:
        """Number of messages that are shown."""
        return self.turns[-1].index + 1

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Characters of `text` that are targets."""
        return [turn.span for turn in self.turns]


@dataclass(frozen=True)
class Ends:
    """Tokens that may stand at a turn's end.

    Attributes:
        special: texts of all special tokens.
        declared: those of them that stop generation (the tokenizer's, the generation config's).
    """

    special: frozenset[str] = frozenset()
    declared: frozenset[str] = frozenset()
    _lengths: list[int] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        lengths = {len(text) for text in self.special | self.declared}
        object.__setattr__(self, "_lengths", sorted(lengths, reverse=True))

    def cut(self, said: str) -> tuple[str, str, bool, bool]:
        """A turn, what the template adds after its end, whether a special token ends it, and
        whether that stops generation.

        Special tokens that touch are one end (`<|END_RESPONSE|><|END_OF_TURN_TOKEN|>`). Where
        white space parts several (Phi-3's `<|end|>`, end of text), the first that stops counts.
        """
        end = after = len(said.rstrip())
        ended = stops = False
        while (start := self._run(said, after)) < after:
            ended = True
            if any(text in said[start:after] for text in self.declared):
                end, stops = after, True
            after = len(said[:start].rstrip())
        return said[:end], said[end:], ended, stops

    def places(self, text: str) -> Iterator[tuple[int, str]]:
        """Where tokens that stop generation stand in a text, in order."""
        pattern = "|".join(map(re.escape, sorted(self.declared, key=len, reverse=True)))
        return ((found.start(), found[0]) for found in re.finditer(pattern, text))

    def _run(self, said: str, end: int) -> int:
        """Where the special tokens that touch one another and reach up to `end` begin."""
        while length := next((n for n in self._lengths if self._is_end(said, end, n)), 0):
            end -= length
        return end

    def _is_end(self, said: str, end: int, length: int) -> bool:
        token = said[end - length : end] if length <= end else ""
        return token in self.special or token in self.declared


def turn(render: Render, messages: Messages, index: int, ends: Ends) -> Turn:
    """The turn that is message `index`, by the rule.

    Raises:
        CorpusError: the template changes the history in a way that hides where the turn begins.
    """
    prompt, whole = render(messages[:index], True), render(messages[: index + 1], False)
    if whole.startswith(prompt):
        return Turn(index, prompt, *ends.cut(whole[len(prompt) :]))
    bare = render(messages[:index], False)
    if not (prompt.startswith(bare) and whole.startswith(bare)):
        bare, whole = "", _without_history(render, messages, index, prompt, whole)
        asked = _without_history(render, messages, index, prompt, prompt, asked=True)
    else:
        whole, asked = whole[len(bare) :], prompt[len(bare) :]
    return _parted(index, prompt[: len(prompt) - len(asked)], asked, whole, ends)


def _parted(index: int, history: str, asked: str, whole: str, ends: Ends) -> Turn:
    """A turn `whole` that does not begin as the prompt `asked` does, after the same history."""
    at = _parting(asked, whole)
    if "</" in asked[at:]:
        return Turn(index, history + whole[:at], *ends.cut(whole[at:]), contradicted=True)
    return Turn(index, history + asked, *ends.cut(whole[at:]))


def _without_history(
    render: Render, messages: Messages, index: int, prompt: str, text: str, asked: bool = False
) -> str:
    """What a rendering has after the last word of the history: the tail that stays the same when
    that word is another."""
    last = dict(messages[index - 1]) if index else {}
    if not isinstance(last.get("content"), str):
        raise CorpusError(
            f"the chat template shows the history of message {index + 1} in another way once it is "
            "there, so that the turn's beginning cannot be told",
            remedy="Give a template that leaves the history alone ([prepare] chat_template).",
        )
    last["content"] += "x"
    other = [*messages[: index - 1], last]
    changed = render(other, True) if asked else render([*other, messages[index]], False)
    return text[len(text) - common_prefix(text[::-1], changed[::-1]) :]


def _parting(asked: str, whole: str) -> int:
    """Where a turn leaves its prompt: after the last tag or word that both have whole."""
    at = common_prefix(asked, whole)
    inside = (p.start() for p in _PIECE.finditer(asked) if p.start() < at < p.end())
    return next(inside, at)


def shown(turns: Sequence[Turn], choice: Choice) -> list[Shown]:
    """Turns as examples: each turn is a target in one of them, where it stands as it was written.

    Args:
        turns: in order.
        choice: `each`: an example for every turn. `auto`: turns share an example where that shows
            the same. `together`: only the example of the last turn, with the turns that it shows
            as they were written. `last`: the last turn alone.
    """
    made: list[Shown] = []
    open_turns = list(turns[-1:] if choice == "last" else turns)
    while open_turns:
        last = open_turns[-1]
        with_it = [t for t in open_turns if t is last or _shows(last, t, choice)]
        made.append(Shown(last.text + last.after, tuple(with_it)))
        if choice == "together":
            break
        open_turns = [t for t in open_turns if t not in with_it]
    return made[::-1]


def _shows(last: Turn, earlier: Turn, choice: Choice) -> bool:
    return choice != "each" and last.prompt.startswith(earlier.text)


def assistant_turns(messages: Messages) -> Iterator[int]:
    """Indices of the assistant's messages."""
    return (i for i, message in enumerate(messages) if message["role"] == "assistant")


def common_prefix(one: str, other: str) -> int:
    """Number of characters with which both begin."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
