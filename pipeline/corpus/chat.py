"""Conversations as tokens: every assistant turn as the model would write it at inference.

One idea: `turns` has the rule, `template` renders, and this module carries both to tokens: a token
is a target when it holds a character that the rule gives to the assistant. What was noticed on the
way (turns that share no example, marks that differ from the rule) is counted and told.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np

from stillroom.cache_schemas.errors import CorpusError, StillroomError
from stillroom.pipeline.corpus.documents import Document
from stillroom.pipeline.corpus.messages import (
    SAYING,
    Message,
    check_roles,
    cleaned,
    taught,
    unflagged,
)
from stillroom.pipeline.corpus.spans import inside, joints, runs_of
from stillroom.pipeline.corpus.spelling import Spelling
from stillroom.pipeline.corpus.stops import stopped
from stillroom.pipeline.corpus.template import ChatTemplate
from stillroom.pipeline.corpus.turns import Choice, Ends, Render, Shown, Turn, shown, turn

Tokens = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """What a run says about its conversations; see `[prepare]`.

    Attributes:
        path: file of a chat template of one's own; empty takes the model's.
        arguments: passed to the template.
        turns: how turns share examples.
        leave_out: fields of messages and rows that the template does not get.
    """

    path: str = ""
    arguments: tuple[tuple[str, Any], ...] = ()
    turns: Choice = "auto"
    leave_out: tuple[str, ...] = ()

    def template(self, owner: Any, tokenizer: Any) -> ChatTemplate:
        """The template that these settings mean.

        Raises:
            CorpusError, ConfigError: see `ChatTemplate`.
        """
        return ChatTemplate(owner, tokenizer.special_tokens_map, self.path, dict(self.arguments))


class ChatTokenizer:
    """Turns conversations into token ids and masks with one tokenizer.

    Args:
        tokenizer: a fast HF tokenizer.
        end_ids: ids that end a turn, beside the tokenizer's own.
        settings: of the run.
        owner: whose chat template it is, where that is not the tokenizer.
        notes: counts what is noticed.

    Raises:
        CorpusError: no chat template, or no character offsets.
    """

    def __init__(
        self,
        tokenizer: Any,
        end_ids: tuple[int, ...] = (),
        settings: ChatSettings | None = None,
        owner: Any = None,
        notes: Counter[str] | None = None,
    ):
        self.settings = settings or ChatSettings()
        self.template = self.settings.template(owner or tokenizer, tokenizer)
        if not tokenizer.is_fast:
            raise CorpusError(
                "the tokenizer gives no character offsets",
                expected="a fast tokenizer (tokenizer.json)",
                where="[prepare] tokenizer",
            )
        self.tokenizer = tokenizer
        self._encode = _whole_texts(tokenizer)
        self.ends = _ends(tokenizer, end_ids)
        self.notes: Counter[str] = Counter() if notes is None else notes
        self.notes["template_writes_the_date"] = int(self.template.writes_the_date)
        self._spelling = Spelling(self.template.render, self.notes)

    def __call__(self, document: Document) -> list[Tokens]:
        """int32 ids [L] and bool mask [L] of each example of a conversation.

        Raises:
            CorpusError: the template refuses the messages, or does not show a part of them.
        """
        made = [self._tokens(example) for example in self.shown(document)]
        self.notes["tokens_read_again"] += sum(len(ids) for ids, _ in made[:-1])
        return made

    def shown(self, document: Document) -> list[Shown]:
        """The examples of a conversation as text, in the order of their last turns.

        Raises:
            CorpusError: as for a call.
        """
        with refusals(document.where, "the chat template refuses these messages"):
            messages, turns = self._turns(document)
            made = shown(turns, self.settings.turns)
            self._count(document, messages, made)
            return made

    def least(self, document: Document) -> int:
        """Tokens that the longest example of a conversation has at least: those of its last turn.

        Raises:
            CorpusError: as for a call.
        """
        with refusals(document.where, "the chat template refuses these messages"):
            _, turns = self._turns(document, last=True)
        return len(self._encoded(turns[-1].text)[0]) if turns else 0

    def prompt(self, document: Document) -> str:
        """The text that asks for the last answer of a conversation, whether it is there or not.

        Raises:
            CorpusError: as for a call; or nobody but the assistant says anything.
        """
        messages = unanswered(document)
        with refusals(document.where, "the chat template refuses these messages"):
            context = self._context(document)
            return self._spelling.prompt(self._given(messages), context)

    def _turns(
        self, document: Document, last: bool = False
    ) -> tuple[Sequence[Message], list[Turn]]:
        """The messages as the template takes them, up to the last turn to learn; those turns."""
        check_roles(document.messages, self.template.source)
        learned = [at for at, learn in enumerate(taught(document.messages)) if learn]
        if not learned:
            self.notes["conversations_without_an_assistant_turn"] += 1
            return (), []
        context = self._context(document)
        messages = self._given(document.messages[: learned[-1] + 1])
        messages = self._spelling.messages(messages, context)

        def render(them: Sequence[Message], prompt: bool) -> str:
            return self.template.render(them, prompt, context)

        made = []
        for at in learned[-1:] if last else learned:
            if (one := self._turn(render, messages, at)) is not None:
                then = document.messages[at + 1 : at + 2]
                made.append(stopped(render, messages, one, self.ends, then))
        return messages, made

    def _turn(self, render: Render, messages: Sequence[Message], at: int) -> Turn | None:
        """A turn; None for one that nothing asks for, where the template knows no such prompt."""
        if at == 0:
            try:
                render((), True)
            except Exception:  # whatever the template does without a message
                self.notes["assistant_turns_before_any_message"] += 1
                return None
        return turn(render, messages, at, self.ends)

    def _given(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        out = self.settings.leave_out
        kept = unflagged(cleaned(messages))
        return tuple({k: v for k, v in m.items() if k not in out} for m in kept) if out else kept

    def _context(self, document: Document) -> dict[str, Any]:
        out = self.settings.leave_out
        return {name: value for name, value in document.context.items() if name not in out}

    def _tokens(self, example: Shown) -> Tokens:
        made = self._encode(example.text, add_special_tokens=False)
        ids = np.asarray(made.ids, dtype=np.int32)
        mask, joined = runs_of(made.token_to_chars, len(ids), example.spans)
        if not joined:
            return ids, mask
        ids, offsets = self._parted(example.text, joined, ids, _offsets(made))
        self.notes["answers_that_begin_inside_a_token"] += len(joints(offsets, example.spans))
        return ids, inside(offsets, example.spans)

    def _encoded(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """int32 ids [L] of a text, and the characters [L, 2] of each."""
        made = self._encode(text, add_special_tokens=False)
        return np.asarray(made.ids, dtype=np.int32), _offsets(made)

    def _parted(
        self, text: str, joined: list[int], ids: np.ndarray, offsets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """A text whose prompts are tokens by themselves, as they are at inference, where that can
        be told from the tokenizer: many put a space before a text that begins with a word."""
        edges = [0, *(at for at in joined if text[at - 1] != " "), len(text)]
        pieces = [(at, *self._encoded(text[at:end])) for at, end in pairwise(edges)]
        apart = np.concatenate([piece[1] for piece in pieces])
        if self.tokenizer.decode(apart) != self.tokenizer.decode(ids):
            return ids, offsets
        return apart, np.concatenate([piece[2] + piece[0] for piece in pieces])

    def _count(self, document: Document, messages: Sequence[Message], made: list[Shown]) -> None:
        told = [one for example in made for one in example.turns]
        self.notes["conversations"] += 1
        self.notes["examples_of_conversations"] += len(made)
        self.notes["answers"] += len(told)
        self.notes["answers_without_an_end_token"] += sum(not one.ended for one in told)
        self.notes["answers_that_end_without_stopping"] += sum(
            one.ended and not one.stops for one in told
        )
        self.notes["answers_after_a_prompt_that_says_otherwise"] += sum(
            one.contradicted for one in told
        )
        for one in told:
            self._count_message(messages, one.index)
        if self.template.marks_itself and made:
            self._check_marks(document, messages, made[-1])

    def _count_message(self, messages: Sequence[Message], at: int) -> None:
        message = messages[at]
        said = next((message[name] for name in ("content", *SAYING) if message.get(name)), "")
        self.notes["empty_answers"] += not said or (isinstance(said, str) and not said.strip())
        after_another = at > 0 and messages[at - 1]["role"] == "assistant"
        self.notes["answers_that_follow_an_answer"] += after_another

    def _check_marks(self, document: Document, messages: Sequence[Message], last: Shown) -> None:
        """Compare the template's own marks with the rule, which counts."""
        text, marks = self.template.marked(messages[: last.upto], self._context(document))
        by_rule = last.spans
        same = text.startswith(last.text) and _touching(marks, by_rule[0][0]) == by_rule
        self.notes["conversations_with_marks_of_their_own"] += 1
        self.notes["marks_that_differ_from_the_rule"] += not same


def unanswered(document: Document) -> tuple[Message, ...]:
    """The messages before the last answer.

    Raises:
        CorpusError: there are none.
    """
    asked = [i for i, message in enumerate(document.messages) if message["role"] != "assistant"]
    if not asked:
        raise CorpusError("has no message to answer", where=document.where)
    return document.messages[: asked[-1] + 1]


@contextmanager
def refusals(where: str, who: str) -> Iterator[None]:
    """Makes whatever a template or processor raises into one kind of error that names the place."""
    try:
        yield
    except StillroomError as error:
        raise placed(error, where) from None
    except Exception as error:  # jinja raises whatever a template author chose
        raise CorpusError(f"{who} ({type(error).__name__}: {error})", where=where) from None


def placed(error: StillroomError, where: str) -> StillroomError:
    """An error that says where, if it did not."""
    if error.where:
        return error
    more = {"expected": error.expected, "remedy": error.remedy}
    return type(error)(error.found, where=where, **more)


def _offsets(made: Any) -> np.ndarray:
    """The characters [L, 2] of each token."""
    found = np.fromiter(chain.from_iterable(made.offsets), np.int64, 2 * len(made))
    return found.reshape(-1, 2)


def _touching(marks: list[tuple[int, int]], begin: int) -> list[tuple[int, int]]:
    """Marked characters from `begin` on; blocks that touch are one."""
    joined: list[tuple[int, int]] = []
    for start, end in marks:
        if start == end or end <= begin:
            continue
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def _whole_texts(tokenizer: Any) -> Callable[..., Any]:
    """The encoder below a fast tokenizer, which makes no lists that nobody asked for."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend.encode


def _ends(tokenizer: Any, end_ids: tuple[int, ...]) -> Ends:
    ids = {*end_ids, tokenizer.eos_token_id} - {None}
    declared = filter(None, (tokenizer.convert_ids_to_tokens(i) for i in ids))
    added = tokenizer.added_tokens_decoder.values()
    special = {token.content for token in added if token.special} | {*tokenizer.all_special_tokens}
    return Ends(frozenset(special - {""}), frozenset(declared))
