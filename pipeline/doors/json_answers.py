"""Log-probabilities that servers write as JSON: vLLM's `prompt_logprobs`, OpenAI's `top_logprobs`.

One idea: a token must be one id, or the row is refused: by the number that is given, or by the one
word of the tokenizer that has exactly its bytes. The sampled token that a server lists beside the
most probable ones is its own signal and no member of the list.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from stillroom.cache_schemas.errors import first_line
from stillroom.pipeline.doors.foreign_answer import ForeignAnswer
from stillroom.pipeline.doors.foreign_rows import Id, Key, Nats, Shape, rows_of, shaped, wrong


class Ranked(Shape):
    """What vLLM says of one token."""

    logprob: Nats
    rank: Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)]


class Dump(Shape):
    """A line of vLLM's."""

    prompt_token_ids: list[Id]
    prompt_logprobs: list[dict[Key, Ranked] | None]
    first_row: Annotated[int, Field(strict=True, ge=0)] = 0
    loss_mask: list[bool] | None = None


class Token(Shape):
    """A token as a server spells it."""

    token: str = ""
    token_id: Id | None = None
    bytes: list[Annotated[int, Field(ge=0, le=255)]] | None = None
    logprob: Nats


class Written(Token):
    """A token of an answer, and what else was likely there."""

    top_logprobs: list[Token]


class Content(Shape):
    """`logprobs` of an answer."""

    content: list[Written] | None = None


class Choice(Shape):
    """One answer."""

    logprobs: Content | None = None


class Answered(Choice):
    """A line of chat completions: a response, or the answer itself, and what was asked."""

    choices: list[Choice] | None = None
    prompt_token_ids: list[Id] | None = None
    prompt: Any = None
    messages: Any = None


def read_prompt_logprobs(source: Path) -> Iterator[ForeignAnswer]:
    """vLLM's dumps: `prompt_token_ids`, and `prompt_logprobs` with null for the first token.

    Each later entry is `{id: {"logprob": ..., "rank": ...}}`, about the token at its place; a
    `loss_mask` or `first_row` that `stillroom cache export` has added is followed.

    Raises:
        CacheError: a line lacks them.
    """
    for row, where in rows_of(source, "jsonl"):
        line = shaped(Dump, row, where)
        tokens, entries = np.array(line.prompt_token_ids, dtype=np.int64), line.prompt_logprobs
        if len(entries) != len(tokens):
            raise wrong(where, f"{len(entries)} entries for {len(tokens)} tokens", "as many")
        first = line.first_row
        if any(entries[: first + 1]):
            raise wrong(where, f"answers before first_row = {first}")
        rows = [
            _ranked(entries[at], int(tokens[at]), f"{where} token {at}")
            for at in range(first + 1, len(tokens))
        ]
        yield _answer(where, tokens, _mask(line, len(tokens), where), first, rows)


def _mask(line: Dump, length: int, where: str) -> np.ndarray:
    """bool [length]: of the file, or every token that there is an answer about (and the first)."""
    if line.loss_mask is None:
        return (np.arange(length) > line.first_row) | (line.first_row == 0)
    if len(line.loss_mask) != length:
        raise wrong(where, f"a loss_mask of {len(line.loss_mask)} for {length} tokens", "as many")
    return np.array(line.loss_mask, dtype=bool)


def _ranked(entry: Mapping[int, Ranked] | None, token: int, where: str) -> tuple[list, float, int]:
    """[(id, log p)] by rank, and log p and rank of the token that follows."""
    if not entry:
        return [], 0.0, 1
    if token not in entry:
        raise wrong(where, f"lacks the token that follows, {token}")
    own = entry[token]
    by_rank = {told.rank: (word, told.logprob) for word, told in entry.items() if word != token}
    others = len(by_rank)
    by_rank.setdefault(own.rank, (token, own.logprob))  # one that ties with the last is beside it
    listed = []
    while len(listed) + 1 in by_rank:  # a token far down is beside the list, not in it
        listed.append(by_rank[len(listed) + 1])
    inside = sum(word != token for word, _ in listed)
    if others != len(entry) - 1 or inside != others:
        ranks = ", ".join(str(told.rank) for told in entry.values())[:40]
        raise wrong(where, f"ranks {ranks}", "1, 2, ... in turn, and the token's own")
    if any(after > before for (_, before), (_, after) in pairwise(listed)):
        raise wrong(where, "log-probabilities that do not fall with their ranks")
    return listed, own.logprob, own.rank


class Words:
    """A tokenizer's words by their bytes.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    @cached_property
    def _ids(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for word in range(len(self.tokenizer)):
            found.setdefault(self.tokenizer.decode([word]), []).append(word)
        return found

    def id_of(self, told: Token, where: str) -> int:
        """The id of a server's token.

        Raises:
            CacheError: it says no number, and no word or several look like it.
        """
        if told.token_id is not None:
            return told.token_id
        number = told.token.removeprefix("token_id:")  # vLLM's return_tokens_as_token_ids
        if number != told.token and number.isascii() and number.isdigit() and len(number) < 10:
            return int(number)
        text = told.token
        if told.bytes:
            text = bytes(told.bytes).decode("utf-8", errors="replace")
        found = [] if "\ufffd" in text else self._ids.get(text, [])  # part of a character
        if len(found) == 1:
            return found[0]
        raise wrong(
            where,
            f"the token {text!r} is {len(found) or 'none'} of the tokenizer's words",
            "one",
            "Ask the server for ids (vLLM: return_tokens_as_token_ids), and capture again.",
        )

    def prompt(self, line: Answered, where: str) -> list[int]:
        """Ids of what was asked: `prompt_token_ids`, `prompt`, or `messages` by the template."""
        if line.prompt_token_ids is not None:
            return line.prompt_token_ids
        if isinstance(line.prompt, str):
            return self.tokenizer(line.prompt)["input_ids"]
        if not line.messages:
            raise wrong(where, "no prompt_token_ids, prompt or messages")
        return self.conversation(line.messages, where, add_generation_prompt=True)

    def conversation(self, messages: Any, where: str, **more: Any) -> list[int]:
        """Ids of messages as the template writes them.

        Raises:
            CacheError: it does not.
        """
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, **more)
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        except Exception as error:  # templates raise whatever they like
            found = f"the template does not write these messages ({first_line(error)})"
            raise wrong(where, found) from None


def read_top_logprobs(source: Path, words: Words) -> Iterator[ForeignAnswer]:
    """OpenAI's chat completions, a response or request and response in one object a line.

    The answer's tokens are what is learned; of the prompt's there are no answers. Every choice of a
    response is a text.

    Raises:
        CacheError: a line lacks its prompt or its log-probabilities.
    """
    for row, where in rows_of(source, "jsonl"):
        line = shaped(Answered, row, where)
        prompt = words.prompt(line, where)
        choices = line.choices or [line]
        for number, choice in enumerate(choices):
            own = where if len(choices) == 1 else f"{where} choice {number}"
            content = (choice.logprobs and choice.logprobs.content) or []
            if not content:
                remedy = "Ask with logprobs and top_logprobs."
                raise wrong(own, "no logprobs.content", "", remedy)
            if not prompt:
                raise wrong(own, "an empty prompt", "what the first token of the answer follows")
            yield _written(prompt, content, words, own)


def _written(
    prompt: list[int], content: Sequence[Written], words: Words, where: str
) -> ForeignAnswer:
    answer = [words.id_of(one, where) for one in content]
    tokens = np.array([*prompt, *answer], dtype=np.int64)
    listed = [[(words.id_of(t, where), t.logprob) for t in one.top_logprobs] for one in content]
    rows = [(own, one.logprob, 0) for own, one in zip(listed, content)]
    mask = np.arange(len(tokens)) >= len(prompt)
    made = _answer(where, tokens, mask, len(prompt) - 1, rows)
    del made.more["token_rank"]  # is not told
    return made


def _answer(where: str, tokens, mask, first: int, rows: Sequence[tuple]) -> ForeignAnswer:
    ids, logprobs = lists_of([listed for listed, _, _ in rows])
    more = {
        "token_logprob": np.array([one for _, one, _ in rows], dtype=np.float32),
        "token_rank": np.array([one for _, _, one in rows], dtype=np.int32),
    }
    return ForeignAnswer(where, tokens, mask, first, ids, logprobs, more)


def lists_of(rows: Sequence[Sequence[tuple[int, float]]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids, int64 [R, k], and log-probabilities, float32 [R, k], of lists of both; -1 and -inf
    where a list is shorter than the longest."""
    k = max(map(len, rows), default=0)
    ids = np.full((len(rows), k), -1, dtype=np.int64)
    logprobs = np.full((len(rows), k), -np.inf, dtype=np.float32)
    for number, row in enumerate(rows):
        for place, (word, value) in enumerate(row):
            ids[number, place], logprobs[number, place] = word, value
    return ids, logprobs
