"""Rows that axolotl's distillation plugin is fed with: conversations and their top-k lists.

One idea: the lists belong to the last tokens of the conversation as the template writes it, as the
plugin itself lays them; since no row says which token a list is about, a text whose own tokens are
hardly ever among the teacher's guesses is refused as laid wrongly. What the plugin makes of rows
(`target_logprobs`, renormalised to the list) has lost its tail for good and is refused.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.pipeline.doors.foreign_answer import ForeignAnswer
from stillroom.pipeline.doors.foreign_rows import Id, Nats, Shape, rows_of, shaped, wrong
from stillroom.pipeline.doors.json_answers import lists_of
from stillroom.pipeline.doors.words import Token, Words

LEAST_HITS = 0.5
"""Share of a text's tokens that must be in their lists: a teacher seldom writes others."""


class Spelt(Shape):
    """A row whose lists name their tokens."""

    messages: list[Any]
    logprobs: list[list[Token] | None]


class Numbered(Shape):
    """A row whose ids stand beside its log-probabilities."""

    messages: list[Any]
    logprobs: list[list[Nats]]
    target_token_ids: list[list[Id]]


def read_axolotl(source: Path, words: Words) -> Iterator[ForeignAnswer]:
    """JSONL with `messages` and `logprobs`, lists of `{"token": "token_id:5", "logprob": -0.1}`; or
    of numbers, with the ids in `target_token_ids`.

    Tokens with a list are learned.

    Raises:
        CacheError: a row lacks them, was prepared already, or is laid wrongly.
    """
    for row, where in rows_of(source, "jsonl"):
        if "target_logprobs" in row:
            raise wrong(
                where,
                "the row was prepared by axolotl, which renormalises to the listed ids",
                "messages and logprobs, before `axolotl preprocess`",
                "Import the rows that axolotl was given.",
            )
        if not row.get("messages") or not row.get("logprobs"):
            raise wrong(where, "no messages and logprobs")
        listed = _lists(row, words, where)
        yield _answer(words.conversation(row["messages"], where), listed, where)


def _answer(
    conversation: list[int], listed: list[list[tuple[int, float]]], where: str
) -> ForeignAnswer:
    tokens = np.array(conversation, dtype=np.int64)
    start = len(tokens) - len(listed)  # of the token that the first list is about
    if start < 1:
        raise wrong(where, f"{len(listed)} lists for {len(tokens)} tokens")
    while listed and not listed[0]:
        listed, start = listed[1:], start + 1
    ids, logprobs = lists_of(listed)
    if not ids.size:
        raise wrong(where, "every list is empty")
    told = (ids >= 0).any(axis=1)
    hits = (ids == tokens[start:, None]).any(axis=1)[told]
    if hits.mean() < LEAST_HITS:
        raise wrong(
            where,
            f"{hits.sum()} of {len(hits)} tokens are among the guesses about them",
            "most: lists belong to the last tokens of the conversation",
            "Give the tokenizer and template that the answers were made with.",
        )
    mask = np.zeros(len(tokens), dtype=bool)
    mask[start:] = told
    return ForeignAnswer(where, tokens, mask, start - 1, ids, logprobs)


def _lists(row: dict[str, Any], words: Words, where: str) -> list[list[tuple[int, float]]]:
    """[(id, log p)] of each of the last tokens; empty where there is none."""
    if "target_token_ids" not in row:
        spelt = shaped(Spelt, row, where)
        return [[(words.id_of(t, where), t.logprob) for t in one or ()] for one in spelt.logprobs]
    numbered = shaped(Numbered, row, where)
    ids, values = numbered.target_token_ids, numbered.logprobs
    if [len(one) for one in ids] != [len(one) for one in values]:
        raise wrong(where, f"{len(ids)} lists of ids for {len(values)} of logprobs", "as long ones")
    return [list(zip(some, others)) for some, others in zip(ids, values)]
