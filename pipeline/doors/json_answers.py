"""Log-probabilities that servers write as JSON: vLLM's `prompt_logprobs`, OpenAI's `top_logprobs`.

One idea: a token must be one id, or the row is refused: by the number that is given, or by the one
word of the tokenizer that has exactly its bytes. The sampled token that a server lists beside the
most probable ones is its own signal and no member of the list.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.cache_schemas.errors import CacheError
from stillroom.pipeline.doors.foreign import ForeignAnswer


def lines_of(source: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """JSON objects of a file, or of every `*.jsonl` of a directory, and where each stands.

    Raises:
        CacheError: a line is no JSON object.
    """
    files = [source] if source.is_file() else sorted(source.glob("*.jsonl"))
    if not files:
        raise CacheError("no JSONL file", where=str(source), remedy="Check the path.")
    for path in files:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _object(line, f"{path} line {number}"), f"{path} line {number}"


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise CacheError(f"is not JSON ({error})", where=where) from None
    if not isinstance(found, dict):
        raise CacheError("is no JSON object", where=where)
    return found


def read_prompt_logprobs(source: Path) -> Iterator[ForeignAnswer]:
    """vLLM's dumps: `prompt_token_ids`, and `prompt_logprobs` with null for the first token.

    Each later entry is `{id: {"logprob": ..., "rank": ...}}`, about the token at its place; a
    `loss_mask` or `first_row` that `stillroom cache export` has added is followed.

    Raises:
        CacheError: a line lacks them.
    """
    for line, where in lines_of(source):
        tokens = np.asarray(_key(line, "prompt_token_ids", where), dtype=np.int64)
        entries = _key(line, "prompt_logprobs", where)
        if len(entries) != len(tokens):
            raise CacheError(
                f"{len(entries)} entries for {len(tokens)} tokens", expected="as many", where=where
            )
        first = int(line.get("first_row", 0))
        if first < 0 or any(one for one in entries[: first + 1]):
            raise CacheError(f"answers before first_row = {first}", where=where)
        rows = [_ranked(one, int(t), where) for one, t in zip(entries, tokens, strict=True)][
            first + 1 :
        ]
        mask = np.asarray(line.get("loss_mask", np.ones(len(tokens))), dtype=bool)
        yield _answer(where, tokens, mask, first, rows)


def _ranked(entry: Mapping[str, Any] | None, token: int, where: str) -> tuple[list, float, int]:
    """[(id, log p)] by rank, and log p and rank of the token that follows."""
    if not entry:
        return [], 0.0, 0
    ranked = {}
    for word, told in entry.items():
        if not isinstance(told, Mapping) or told.get("rank") is None:
            raise CacheError(f"token {word} without its rank", where=where)
        ranked[int(told["rank"])] = (int(word), _number(told["logprob"]))
    own = next(((p, r) for r, (word, p) in ranked.items() if word == token), None)
    if own is None:
        raise CacheError(f"lacks the token that follows, {token}", where=where)
    listed = []
    while len(listed) + 1 in ranked:  # a token far down is beside the list, not in it
        listed.append(ranked[len(listed) + 1])
    return listed, *own


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

    def id_of(self, told: Mapping[str, Any], where: str) -> int:
        """The id of a server's token.

        Raises:
            CacheError: it says no number, and no word or several look like it.
        """
        if "token_id" in told:
            return int(told["token_id"])
        text = str(told.get("token", ""))
        if text.startswith("token_id:"):  # vLLM's return_tokens_as_token_ids
            return int(text.removeprefix("token_id:"))
        if told.get("bytes"):
            text = bytes(told["bytes"]).decode("utf-8", errors="replace")
        found = self._ids.get(text, [])
        if len(found) == 1:
            return found[0]
        raise CacheError(
            f"the token {text!r} is {len(found) or 'none'} of the tokenizer's words",
            expected="one",
            where=where,
            remedy="Ask the server for ids (vLLM: return_tokens_as_token_ids), and capture again.",
        )

    def prompt(self, line: Mapping[str, Any], where: str) -> list[int]:
        """Ids of what was asked: `prompt_token_ids`, `prompt`, or `messages` by the template."""
        if "prompt_token_ids" in line:
            return list(line["prompt_token_ids"])
        if isinstance(line.get("prompt"), str):
            return self.tokenizer(line["prompt"])["input_ids"]
        messages = line.get("messages")
        if not messages:
            raise CacheError("no prompt_token_ids, prompt or messages", where=where)
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def read_top_logprobs(source: Path, words: Words) -> Iterator[ForeignAnswer]:
    """OpenAI's chat completions, a response or request and response in one object a line.

    The answer's tokens are what is learned; of the prompt's there are no answers.

    Raises:
        CacheError: a line lacks its prompt or its log-probabilities.
    """
    for line, where in lines_of(source):
        prompt = words.prompt(line, where)
        told = (line.get("choices") or [line])[0]
        content = ((told.get("logprobs") or {}).get("content")) or []
        if not prompt or not content:
            raise CacheError(
                "no logprobs.content", where=where, remedy="Ask with logprobs and top_logprobs."
            )
        answer = [words.id_of(one, where) for one in content]
        tokens = np.array([*prompt, *answer], dtype=np.int64)
        listed = [
            [(words.id_of(t, where), _number(t["logprob"])) for t in one["top_logprobs"]]
            for one in content
        ]
        rows = [(own, _number(one["logprob"]), 0) for own, one in zip(listed, content)]
        mask = np.arange(len(tokens)) >= len(prompt)
        made = _answer(where, tokens, mask, len(prompt) - 1, rows)
        del made.more["token_rank"]  # is not told
        yield made


def _answer(where: str, tokens, mask, first: int, rows: Sequence[tuple]) -> ForeignAnswer:
    k = max((len(listed) for listed, _, _ in rows), default=0)
    ids = np.full((len(rows), k), -1, dtype=np.int64)
    logprobs = np.full((len(rows), k), -np.inf, dtype=np.float32)
    for number, (listed, _, _) in enumerate(rows):
        for place, (word, value) in enumerate(listed):
            ids[number, place], logprobs[number, place] = word, value
    more = {
        "token_logprob": np.array([one for _, one, _ in rows], dtype=np.float32),
        "token_rank": np.array([one for _, _, one in rows], dtype=np.int32),
    }
    return ForeignAnswer(where, tokens, mask, first, ids, logprobs, more)


def _number(told: Any) -> float:
    return float(told) if isinstance(told, int | float) else float("nan")


def _key(line: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in line:
        raise CacheError(f"no {key}", expected=f"{key} beside {', '.join(line)}", where=where)
    return line[key]
