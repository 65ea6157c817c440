"""Log-probabilities that servers write as JSON: vLLM's `prompt_logprobs`, OpenAI's `top_logprobs`.

One idea: the sampled token that a server lists beside the most probable ones is its own signal and
no member of the list. Which id a spelt token is, and whether the tokens hold the text beside them,
is found out in `words`.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from stillroom.pipeline.doors.foreign_answer import SAME, ForeignAnswer
from stillroom.pipeline.doors.foreign_rows import (
    NOTHING,
    Id,
    Key,
    Nats,
    Shape,
    rows_of,
    shaped,
    wrong,
)
from stillroom.pipeline.doors.words import Token, Words

ASKED = ("prompt_token_ids", "prompt", "messages")
"""Keys of a line that say what was asked."""


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
    prompt: Any = None


class Written(Token):
    """A token of an answer, and what else was likely there."""

    top_logprobs: list[Token]


class Content(Shape):
    """`logprobs` of an answer."""

    content: list[Written] | None = None


class Choice(Shape):
    """One answer."""

    logprobs: Content | None = None
    message: Any = None


class Answered(Choice):
    """A line of chat completions: a response, or the answer itself, and what was asked."""

    choices: list[Choice] | None = None
    prompt_token_ids: list[Id] | None = None
    prompt: Any = None
    messages: Any = None


def read_prompt_logprobs(source: Path, words: Words) -> Iterator[ForeignAnswer]:
    """vLLM's dumps: `prompt_token_ids`, and `prompt_logprobs` with null for the first token.

    Each later entry is `{id: {"logprob": ..., "rank": ...}}`, about the token at its place; a
    `loss_mask` or `first_row` that `stillroom cache export` has added is followed. Tokens must hold
    the `prompt` beside them.

    Raises:
        CacheError: a line lacks them.
    """
    for row, where in rows_of(source, "jsonl"):
        line = shaped(Dump, row, where)
        tokens, entries = np.array(line.prompt_token_ids, dtype=np.int64), line.prompt_logprobs
        if len(entries) != len(tokens):
            raise wrong(where, f"{len(entries)} entries for {len(tokens)} tokens", "as many")
        words.check_shown(line.prompt_token_ids, line.prompt, "prompt", where)
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
    if any(after > before + SAME for (_, before), (_, after) in pairwise(listed)):
        raise wrong(where, "log-probabilities that do not fall with their ranks")
    return listed, own.logprob, own.rank


def read_top_logprobs(source: Path, words: Words) -> Iterator[ForeignAnswer]:
    """OpenAI's chat completions, a response or request and response in one object a line; of the
    batch API `response.body` is read, and the request beside it or in `body`.

    The answer's tokens are what is learned; of the prompt's there are no answers. Every choice of a
    response is a text, and its tokens must hold its `message.content`.

    Raises:
        CacheError: a line lacks its prompt or its log-probabilities, or tokens of its text.
    """
    for row, where in rows_of(source, "jsonl"):
        line = shaped(Answered, _unwrapped(row), where)
        prompt = _prompt(line, words, where)
        choices = line.choices or [line]
        for number, choice in enumerate(choices):
            own = where if len(choices) == 1 else f"{where} choice {number}"
            content = (choice.logprobs and choice.logprobs.content) or []
            if not content:
                remedy = "Ask with logprobs and top_logprobs; where they are elsewhere in the row, "
                remedy += "lay choices at its top (or in response.body)."
                raise wrong(own, "no logprobs.content", "", remedy)
            if not prompt:
                raise wrong(own, "an empty prompt", "what the first token of the answer follows")
            made = _written(prompt, content, words, own)
            said = choice.message.get("content") if isinstance(choice.message, dict) else None
            words.check_shown(made.token_ids[len(prompt) :].tolist(), said, "message.content", own)
            yield made


def _unwrapped(row: dict[str, Any]) -> dict[str, Any]:
    """A row with what the batch API wraps: the request in `body`, the answer in `response.body`."""
    asked, response = _inside(row, "body") or _inside(row, "request"), _inside(row, "response")
    answered = _inside(response, "body") or response
    found = {key: asked[key] for key in ASKED if key in asked}
    return found | {key: answered[key] for key in ("choices", *ASKED) if key in answered} | row


def _inside(row: dict[str, Any], key: str) -> dict[str, Any]:
    found = row.get(key)
    return found if isinstance(found, dict) else {}


def _prompt(line: Answered, words: Words, where: str) -> list[int]:
    """Ids of what was asked: `prompt_token_ids`, `prompt`, or `messages` by the template."""
    if line.prompt_token_ids is not None:
        words.check_shown(line.prompt_token_ids, line.prompt, "prompt", where)
        return line.prompt_token_ids
    if isinstance(line.prompt, str):
        return words.tokenizer(line.prompt)["input_ids"]
    if not line.messages:
        remedy = f"{NOTHING}; of a batch, lay the request's messages beside the response."
        raise wrong(where, "no prompt_token_ids, prompt or messages", "", remedy)
    return words.conversation(line.messages, where, add_generation_prompt=True)


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
