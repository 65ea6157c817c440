"""Rows that axolotl's distillation plugin is fed with: conversations and their top-k lists.

One idea: the lists belong to the last tokens of the conversation as the template writes it, as the
plugin itself lays them; since no row says which token a list is about, a text whose own tokens are
hardly ever among the teacher's guesses is refused as laid wrongly. What the plugin makes of rows
(`target_logprobs`, renormalised to the list) has lost its tail for good and is refused.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.cache_schemas.errors import CacheError
from stillroom.pipeline.doors.foreign import ForeignAnswer
from stillroom.pipeline.doors.json_answers import Words, lines_of

LEAST_HITS = 0.5
"""Share of a text's tokens that must be in their lists: a teacher seldom writes others."""


def read_axolotl(source: Path, words: Words) -> Iterator[ForeignAnswer]:
    """JSONL with `messages` and `logprobs`, lists of `{"token": "token_id:5", "logprob": -0.1}`; or
    of numbers, with the ids in `target_token_ids`.

    Tokens with a list are learned.

    Raises:
        CacheError: a row lacks them, was prepared already, or is laid wrongly.
    """
    for line, where in lines_of(source):
        if "target_logprobs" in line:
            raise CacheError(
                "the row was prepared by axolotl, which renormalises to the listed ids",
                expected="messages and logprobs, before `axolotl preprocess`",
                where=where,
                remedy="Import the rows that axolotl was given.",
            )
        if not line.get("messages") or not line.get("logprobs"):
            raise CacheError("no messages and logprobs", where=where)
        yield _answer(line, words, where)


def _answer(line: Mapping[str, Any], words: Words, where: str) -> ForeignAnswer:
    text = words.tokenizer.apply_chat_template(line["messages"], tokenize=False)
    tokens = np.array(words.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)
    listed = _lists(line, words, where)
    start = len(tokens) - len(listed)  # of the token that the first list is about
    if start < 1:
        raise CacheError(f"{len(listed)} lists for {len(tokens)} tokens", where=where)
    while listed and not listed[0]:
        listed, start = listed[1:], start + 1
    k = max(map(len, listed), default=0)
    if not k:
        raise CacheError("every list is empty", where=where)
    ids = np.full((len(listed), k), -1, dtype=np.int64)
    logprobs = np.full((len(listed), k), -np.inf, dtype=np.float32)
    for row, entries in enumerate(listed):
        for place, (word, value) in enumerate(sorted(entries, key=lambda one: -one[1])):
            ids[row, place], logprobs[row, place] = word, value
    told = (ids >= 0).any(axis=1)
    hits = (ids == tokens[start:, None]).any(axis=1)[told]
    if hits.mean() < LEAST_HITS:
        raise CacheError(
            f"{hits.sum()} of {len(hits)} tokens are among the guesses about them",
            expected="most: lists belong to the last tokens of the conversation",
            where=where,
            remedy="Give the tokenizer and template that the answers were made with.",
        )
    mask = np.zeros(len(tokens), dtype=bool)
    mask[start:] = told
    return ForeignAnswer(where, tokens, mask, start - 1, ids, logprobs)


def _lists(line: Mapping[str, Any], words: Words, where: str) -> list[list[tuple[int, float]]]:
    """[(id, log p)] of each of the last tokens; empty where there is none."""
    given = line["logprobs"]
    if "target_token_ids" not in line:
        return [[(words.id_of(t, where), float(t["logprob"])) for t in one or ()] for one in given]
    ids = line["target_token_ids"]
    if len(ids) != len(given):
        raise CacheError(f"{len(ids)} lists of ids for {len(given)} of logprobs", where=where)
    return [list(zip(map(int, some), map(float, values))) for some, values in zip(ids, given)]
