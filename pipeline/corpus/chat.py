"""Conversations as tokens: the chat template applied once, and which tokens the assistant said.

One idea: a conversation is rendered once as a whole, and the loss mask marks exactly the tokens
that the model itself would generate: each assistant turn from the end of its generation prompt to
its end-of-turn token. Templates that mark this (`{% generation %}`) are believed; for the
others the spans are found in the rendered text and carried to tokens by character offsets.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.corpus.documents import Document

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\b")
Tokens = tuple[np.ndarray, np.ndarray]


class ChatTokenizer:
    """Turns conversations into token ids and the assistant's mask with one tokenizer.

    Args:
        tokenizer: a fast HF tokenizer with a chat template.
        end_ids: ids that end a turn (the tokenizer's and the generation config's).

    Raises:
        CorpusError: the tokenizer has no chat template or gives no character offsets.
    """

    def __init__(self, tokenizer: Any, end_ids: tuple[int, ...] = ()):
        if not tokenizer.chat_template:
            raise CorpusError(
                "the tokenizer has no chat template",
                where="[[prepare.source]] messages_column",
                remedy="Use an instruct model, or a text column.",
            )
        if not tokenizer.is_fast:
            raise CorpusError(
                "the tokenizer gives no character offsets",
                expected="a fast tokenizer (tokenizer.json)",
                where="[prepare] tokenizer",
            )
        self.tokenizer = tokenizer
        self.marks_itself = bool(GENERATION_BLOCK.search(_template_text(tokenizer)))
        self.ends = _end_texts(tokenizer, end_ids)

    def __call__(self, document: Document) -> Tokens:
        """int32 ids [L] and bool mask [L] of a conversation.

        Raises:
            CorpusError: the template refuses the messages, or a turn cannot be found in its text.
        """
        messages = [_plain(message) for message in document.messages]
        with _refusals(document):
            return self._marked(messages) if self.marks_itself else self._found(messages, document)

    def _marked(self, messages: list[dict[str, Any]]) -> Tokens:
        made = self.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        mask = np.asarray(made["assistant_masks"], dtype=bool)
        return np.asarray(made["input_ids"], dtype=np.int32), mask

    def _found(self, messages: list[dict[str, Any]], document: Document) -> Tokens:
        text, spans = self._spans(messages, document)
        made = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.asarray(made["input_ids"], dtype=np.int32)
        return ids, inside(np.asarray(made["offset_mapping"]).reshape(-1, 2), text, spans)

    def rendered(self, document: Document) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and which of its characters the assistant said.

        Raises:
            CorpusError: as for a call.
        """
        messages = [_plain(message) for message in document.messages]
        with _refusals(document):
            if not self.marks_itself:
                return self._spans(messages, document)
            return _marked_spans(self.tokenizer, messages)

    def prompt(self, document: Document) -> str:
        """The text that asks for the last answer of a conversation, whether it is there or not.

        Raises:
            CorpusError: as for a call; or nobody but the assistant says anything.
        """
        messages = unanswered(document)
        with _refusals(document):
            return self._render([_plain(message) for message in messages], prompt=True)

    def _spans(self, messages: list[dict[str, Any]], document: Document) -> tuple[str, list]:
        text = self._render(messages)
        spans = [
            self._span(text, messages, index, document)
            for index, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        return text, spans

    def _render(self, messages: list[dict[str, Any]], prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt
        )

    def _span(self, text: str, messages: list, index: int, document: Document) -> tuple[int, int]:
        """Characters of one assistant turn: after its generation prompt, to its end token."""
        prompt = self._render(messages[:index], prompt=True) if index else ""
        start = _common_prefix(text, prompt)  # characters
        content = _spoken(messages[index])
        at = text.find(content, start)
        if at < 0 or start < len(prompt.rstrip()):
            raise CorpusError(
                f"message {index + 1} cannot be found again in the rendered conversation",
                where=document.where,
                remedy="Give the chat template {% generation %} blocks around assistant turns.",
            )
        end = self._end(text, at + len(content), calls="tool_calls" in messages[index])
        return (start if index else at), end

    def _end(self, text: str, spoken: int, calls: bool) -> int:
        """Where a turn ends: after its end token, if that follows over white space (or calls)."""
        for end in self.ends:
            at = text.find(end, spoken)
            if at >= 0 and (calls or not text[spoken:at].strip()):
                return at + len(end)
        return spoken


def unanswered(document: Document) -> tuple[dict[str, Any], ...]:
    """The messages before the last answer.

    Raises:
        CorpusError: there are none.
    """
    asked = [i for i, message in enumerate(document.messages) if message["role"] != "assistant"]
    if not asked:
        raise CorpusError("has no message to answer", where=document.where)
    return document.messages[: asked[-1] + 1]


@contextmanager
def _refusals(document: Document) -> Iterator[None]:
    """Makes whatever a template raises into one kind of error that names the document."""
    try:
        yield
    except CorpusError:
        raise
    except Exception as error:  # jinja raises whatever a template author chose
        raise CorpusError(
            f"the chat template refuses these messages ({type(error).__name__}: {error})",
            where=document.where,
        ) from None


def _marked_spans(tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[str, list]:
    """Text and characters inside the template's generation blocks."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = render_jinja_template(
        conversations=[messages],
        chat_template=tokenizer.chat_template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return texts[0], [(int(start), int(end)) for start, end in spans[0]]


def _spoken(message: dict[str, Any]) -> str:
    """The text of a message, whose content may be a string or a list of parts."""
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content)
    return content.strip()


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """Drop absent fields, which Parquet writes as nulls and templates take for present."""
    return {key: value for key, value in message.items() if value is not None}


def _template_text(tokenizer: Any) -> str:
    template = tokenizer.chat_template
    return template if isinstance(template, str) else str(template)


def _end_texts(tokenizer: Any, end_ids: tuple[int, ...]) -> list[str]:
    ids = {*end_ids, tokenizer.eos_token_id} - {None}
    return sorted((tokenizer.convert_ids_to_tokens(i) or "" for i in ids), key=len, reverse=True)


def _common_prefix(text: str, prompt: str) -> int:
    """How much of `prompt` the text begins with."""
    if text.startswith(prompt):
        return len(prompt)
    pairs = zip(text, prompt)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(prompt)))


def inside(offsets: np.ndarray, text: str, spans: list[tuple[int, int]]) -> np.ndarray:
    """Tokens [L] that hold characters of a span and, beside them, at most white space before it.

    Prompts that end in a space need this: most tokenizers join that space to the first word.
    """
    mask = np.zeros(len(offsets), dtype=bool)
    begins, ends = offsets[:, 0], offsets[:, 1]  # [L], characters
    for start, end in spans:
        earliest = len(text[:start].rstrip())
        mask |= (begins >= earliest) & (ends > start) & (ends <= end)
    return mask
