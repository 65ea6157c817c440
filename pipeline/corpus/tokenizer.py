"""The tokenizer of a corpus: loading it, what identifies it, whether it is the right one.

One idea: a tokenizer is identified by what it does (its vocabulary, merges and rules in canonical
form), not by the file it was read from, so that re-saving it changes nothing.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.cache_schemas.errors import CorpusError, PlanMismatch
from stillroom.pipeline.config import Teacher
from stillroom.pipeline.corpus.chat import ChatTokenizer, Tokens
from stillroom.pipeline.corpus.documents import Document
from stillroom.pipeline.corpus.image_chat import (
    ImageChat,
    has_image_processor,
    load_processor,
    settings_sha256,
)
from stillroom.pipeline.corpus.prefix_chat import PrefixChat
from stillroom.pipeline.teacher.facts import model_directory, model_shape

PREFIX_PROCESSORS = ("PaliGemmaProcessor", "ColPaliProcessor")


def tokenizer_facts(model: str) -> dict[str, Any]:
    """Identity of a model's tokenizer: `sha256`, `chat_template_sha256`, `vocab_size`.

    Raises:
        CorpusError: no tokenizer is there, or it cannot be loaded.
    """
    return _facts(_load(_directory(model, "")))


def vocabulary(model: str) -> dict[str, int]:
    """Token -> id of a model's tokenizer.

    Raises:
        CorpusError: no tokenizer is there, or it cannot be loaded.
    """
    return _load(_directory(model, "")).get_vocab()


@dataclass(frozen=True)
class CorpusTokenizer:
    """A loaded tokenizer with what preparing needs to know of its model.

    Attributes:
        hf: the transformers tokenizer.
        facts: see `tokenizer_facts`.
        where: directory or hub id, for messages.
        directory: where its files lie.
        context: most tokens the teacher attends to; 0 when unknown.
        head: size of the teacher's vocabulary; 0 when there is no teacher.
        end_ids: ids that end a turn according to the model's generation config.
    """

    hf: Any
    facts: dict[str, Any]
    where: str
    directory: Path
    context: int
    head: int
    end_ids: tuple[int, ...]

    @classmethod
    def open(cls, tokenizer: str, teacher_model: str, revision: str = "") -> "CorpusTokenizer":
        """Load the tokenizer of a corpus and compare it with the teacher's own.

        Raises:
            PlanMismatch: `tokenizer` is set and is not the teacher's.
            CorpusError: it cannot be loaded.
        """
        directory = _directory(tokenizer or teacher_model, "" if tokenizer else revision)
        hf = _load(directory)
        facts = _facts(hf)
        if tokenizer and teacher_model:
            _must_agree(facts, tokenizer, teacher_model, revision)
        teacher = Teacher(model=teacher_model, revision=revision) if teacher_model else None
        shape = model_shape(teacher) if teacher else None
        return cls(
            hf=hf,
            facts=facts,
            where=tokenizer or teacher_model,
            directory=directory,
            context=shape.context if shape else 0,
            head=shape.vocab_size if shape else 0,
            end_ids=_end_ids(directory),
        )

    @property
    def template(self) -> str:
        """The chat template as text."""
        return str(self.hf.chat_template or "")

    def texts(self, texts: list[str]) -> Iterator[Tokens]:
        """Plain documents, with the special tokens that the tokenizer adds; all are targets."""
        for ids in self.hf(texts, verbose=False)["input_ids"]:
            yield np.asarray(ids, dtype=np.int32), np.ones(len(ids), dtype=bool)

    def chat(self, document: Document) -> Tokens:
        """A conversation, with the assistant's tokens as targets."""
        return self._chat(document)

    def prompt(self, document: Document) -> np.ndarray:
        """int32 ids that ask for a conversation's last answer, or begin a text."""
        if not document.messages:
            return next(self.texts([document.text]))[0]
        made = self.hf(self._chat.prompt(document), add_special_tokens=False, verbose=False)
        return np.asarray(made["input_ids"], dtype=np.int32)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return tuple(sorted({*self.end_ids, self.hf.eos_token_id} - {None}))

    @cached_property
    def has_processor(self) -> bool:
        """Whether this is the tokenizer of an image-text model."""
        return has_image_processor(self.directory)

    def image_chat(self, arguments: dict[str, Any]) -> ImageChat | PrefixChat:
        """What reads conversations with images, by the model's processor."""
        processor = load_processor(self.directory)
        if type(processor).__name__ in PREFIX_PROCESSORS:
            facts = {"sha256": settings_sha256(processor), "arguments": arguments}
            return PrefixChat(processor, arguments, facts)
        return ImageChat(processor, arguments, self.end_ids)

    def check_ids(self, highest: int) -> None:
        """Refuse token ids that the teacher has no logits for."""
        if self.head and highest >= self.head:
            raise CorpusError(
                f"the tokenizer gave token id {highest}",
                expected=f"ids below {self.head}, the teacher's vocabulary",
                where=self.where,
                remedy="Use the tokenizer that belongs to the teacher.",
            )

    @cached_property
    def _chat(self) -> ChatTokenizer:
        return ChatTokenizer(self.hf, self.end_ids)


def _directory(model: str, revision: str) -> Path:
    """A directory with a tokenizer need not hold a model."""
    path = Path(model).expanduser()
    return path if path.is_dir() else model_directory(Teacher(model=model, revision=revision))


def _load(directory: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # whatever a broken tokenizer file makes the libraries raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CorpusError(
            f"no tokenizer can be loaded ({reason})",
            where=str(directory),
            expected="tokenizer.json and tokenizer_config.json",
            remedy="Complete the directory, or set [prepare] tokenizer.",
        ) from None


def _facts(hf: Any) -> dict[str, Any]:
    template = str(hf.chat_template or "")
    return {
        "sha256": hashlib.sha256(_canonical(hf)).hexdigest(),
        "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest(),
        "vocab_size": len(hf),
    }


def _canonical(hf: Any) -> bytes:
    """The tokenizer as sorted JSON without the settings of the last call (padding, truncation)."""
    if not getattr(hf, "is_fast", False):
        made: Any = {"class": type(hf).__name__, "vocab": hf.get_vocab()}
    else:
        made = json.loads(hf.backend_tokenizer.to_str())
        made.pop("padding", None)
        made.pop("truncation", None)
    return json.dumps(made, sort_keys=True).encode()


def _must_agree(facts: dict, tokenizer: str, teacher_model: str, revision: str) -> None:
    own = _facts(_load(_directory(teacher_model, revision)))
    if facts["sha256"] != own["sha256"]:
        raise PlanMismatch(
            f"[prepare] tokenizer is {tokenizer} ({facts['sha256'][:12]})",
            expected=f"the teacher's ({own['sha256'][:12]})",
            where=teacher_model,
            remedy="Leave [prepare] tokenizer empty, or name the teacher's own tokenizer.",
        )


def _end_ids(directory: Path) -> tuple[int, ...]:
    try:
        found = json.loads((directory / "generation_config.json").read_text()).get("eos_token_id")
    except (OSError, ValueError):
        return ()
    return tuple(found) if isinstance(found, list) else () if found is None else (found,)
