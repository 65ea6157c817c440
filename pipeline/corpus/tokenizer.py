"""The tokenizer of a corpus: loading it, what identifies it, whether it is the right one.

One idea: a tokenizer is identified by what it does (its vocabulary, merges and rules in canonical
form), not by the file it was read from, so that re-saving it changes nothing.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.cache_schemas.errors import CorpusError, PlanMismatch, first_line
from stillroom.pipeline.config import Teacher
from stillroom.pipeline.corpus.chat import ChatSettings, ChatTokenizer, Tokens
from stillroom.pipeline.corpus.documents import Document
from stillroom.pipeline.corpus.image_chat import (
    ImageChat,
    has_image_processor,
    load_processor,
    settings_sha256,
)
from stillroom.pipeline.corpus.prefix_chat import PrefixChat
from stillroom.pipeline.teacher.facts import model_shape, settings_directory

PROBE = "any text"
COMPLETE = "Complete the directory, or set [prepare] tokenizer."
TRUST = "Read the code there; if you trust it, set [teacher] trust_remote_code = true."
PREFIX_PROCESSORS = ("PaliGemmaProcessor", "ColPaliProcessor")


def tokenizer_facts(model: str, trusts_code: bool = False) -> dict[str, Any]:
    """Identity of a model's tokenizer: `sha256`, `chat_template_sha256`, `vocab_size`.

    Args:
        model: HF directory or hub id.
        trusts_code: whether Python code of the directory may be run.

    Raises:
        CorpusError: no tokenizer is there, or it cannot be loaded.
    """
    return facts_of_tokenizer(_load(_directory(model, ""), trusts_code))


def load_tokenizer(model: str, trusts_code: bool = False) -> Any:
    """The tokenizer of transformers itself.

    Raises:
        CorpusError: no tokenizer is there, or it cannot be loaded.
    """
    return _load(_directory(model, ""), trusts_code)


def vocabulary(model: str, trusts_code: bool = False) -> dict[str, int]:
    """Token -> id of a model's tokenizer.

    Args:
        model: HF directory or hub id.
        trusts_code: whether Python code of the directory may be run.

    Raises:
        CorpusError: no tokenizer is there, or it cannot be loaded.
    """
    return _load(_directory(model, ""), trusts_code).get_vocab()


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
        trusts_code: whether Python code of the directory may be run.
        chats: what the run says about conversations.
        notes: what was noticed in them, and how often.
    """

    hf: Any
    facts: dict[str, Any]
    where: str
    directory: Path
    context: int
    head: int
    end_ids: tuple[int, ...]
    trusts_code: bool
    chats: ChatSettings
    notes: Counter[str] = field(default_factory=Counter)

    @classmethod
    def open(
        cls,
        tokenizer: str,
        teacher_model: str,
        revision: str = "",
        trusts_code: bool = False,
        chats: ChatSettings | None = None,
    ) -> "CorpusTokenizer":
        """Load the tokenizer of a corpus and compare it with the teacher's own.

        Raises:
            PlanMismatch: `tokenizer` is set and is not the teacher's.
            CorpusError: it cannot be loaded.
        """
        if tokenizer:
            directory = _directory(tokenizer, "", "[prepare] tokenizer")
        else:
            directory = _directory(teacher_model, revision)
        hf = _load(directory, trusts_code)
        facts = facts_of_tokenizer(hf)
        teacher = None
        if teacher_model:
            teacher = Teacher(model=teacher_model, revision=revision, trust_remote_code=trusts_code)
        if tokenizer and teacher:
            _must_agree(facts, tokenizer, teacher)
        shape = model_shape(teacher) if teacher else None
        return cls(
            hf=hf,
            facts=facts,
            where=tokenizer or teacher_model,
            directory=directory,
            context=shape.context if shape else 0,
            head=shape.vocab_size if shape else 0,
            end_ids=_end_ids(settings_directory(teacher) if teacher else directory),
            trusts_code=trusts_code,
            chats=chats or ChatSettings(),
        )

    @property
    def template(self) -> str:
        """The chat template as text: the run's own, or the tokenizer's."""
        own = self.chats.path and self.chat.template.source
        return own or str(self.hf.chat_template or "")

    def texts(self, texts: list[str], ended: bool = False) -> Iterator[Tokens]:
        """Plain documents, with the special tokens that the tokenizer adds and, if they are to be
        `ended`, the end token; all are targets."""
        end = [self.hf.eos_token_id]
        for ids in self.hf(texts, verbose=False)["input_ids"]:
            if ended and ids[-1:] != end:
                ids = [*ids, *end]
            yield np.asarray(ids, dtype=np.int32), np.ones(len(ids), dtype=bool)

    @cached_property
    def begin_ids(self) -> tuple[int, ...]:
        """Ids that the tokenizer puts before a text (BOS, mostly); found by asking it."""
        bare = self.hf(PROBE, add_special_tokens=False)["input_ids"]
        whole = self.hf(PROBE)["input_ids"]
        starts = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        return tuple(whole[: next(starts, 0)])

    def prompt(self, document: Document) -> np.ndarray:
        """int32 ids that ask for a conversation's last answer, or begin a text."""
        if not document.messages:
            return next(self.texts([document.text]))[0]
        made = self.hf(self.chat.prompt(document), add_special_tokens=False, verbose=False)
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
        """What turns conversations with images into examples, by the model's processor."""
        processor = load_processor(self.directory, self.trusts_code)
        if type(processor).__name__ in PREFIX_PROCESSORS:
            facts = {"sha256": settings_sha256(processor), "arguments": arguments}
            return PrefixChat(processor, arguments, facts)
        return ImageChat(processor, arguments, self.end_ids, self.chats, self.notes)

    def check_ids(self, highest: int) -> None:
        """Refuse token ids that the teacher has no logits for."""
        if self.head and highest >= self.head:
            raise CorpusError(
                f"the tokenizer gave token id {highest}",
                expected=f"ids below {self.head}, the teacher's vocabulary",
                where=self.where,
                remedy="Use the tokenizer that belongs to the teacher.",
            )

    def least(self, document: Document) -> int:
        """Tokens that one example of a conversation has at least; 0 where only a processor can
        tell."""
        return 0 if self.has_processor else self.chat.least(document)

    @cached_property
    def chat(self) -> ChatTokenizer:
        """What turns conversations into examples, with the assistant's tokens as targets."""
        return ChatTokenizer(self.hf, self.end_ids, self.chats, notes=self.notes)


def _directory(model: str, revision: str, named_by: str = "[teacher] model") -> Path:
    """A directory with a tokenizer need not hold a model."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    return settings_directory(Teacher(model=model, revision=revision).named_by(named_by))


def _load(directory: Path, trusts_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trusts_code)
    except Exception as error:  # whatever a broken tokenizer file makes the libraries raise
        reason = first_line(error)
        raise CorpusError(
            f"no tokenizer can be loaded ({reason})",
            where=str(directory),
            expected="tokenizer.json and tokenizer_config.json",
            remedy=TRUST if "trust_remote_code" in reason else COMPLETE,
        ) from None


def facts_of_tokenizer(hf: Any) -> dict[str, Any]:
    """`tokenizer_facts` of a loaded one."""
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


def _must_agree(facts: dict, tokenizer: str, teacher: Teacher) -> None:
    own = facts_of_tokenizer(_load(settings_directory(teacher), teacher.trust_remote_code))
    if facts["sha256"] != own["sha256"]:
        raise PlanMismatch(
            f"[prepare] tokenizer is {tokenizer} ({facts['sha256'][:12]})",
            expected=f"the teacher's ({own['sha256'][:12]})",
            where=teacher.model,
            remedy="Leave [prepare] tokenizer empty, or name the teacher's own tokenizer.",
        )


def _end_ids(directory: Path) -> tuple[int, ...]:
    """Ids that stop generation: of the generation config, or else of the model's config, from which
    transformers and vLLM make one; none where neither says.

    Raises:
        CorpusError: a file is there and says something else than ids.
    """
    for name in ("generation_config.json", "config.json"):
        found = _ids_in(directory / name) if (directory / name).is_file() else None
        if found is not None:
            return found
    return ()


def _ids_in(path: Path) -> tuple[int, ...] | None:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        inner = settings.get("text_config") or {}
        said = settings.get("eos_token_id", inner.get("eos_token_id"))
        found = said if isinstance(said, list) else [said]
        if said is not None and any(type(number) is not int for number in found):
            raise ValueError(f"eos_token_id = {said!r}")
    except (OSError, ValueError, AttributeError) as error:
        raise CorpusError(
            f"does not say which tokens end a turn ({first_line(error)})",
            expected="JSON with eos_token_id as an id or a list of ids, or no such file",
            where=str(path),
            remedy="Get the file again, or delete it: then the tokenizer's end token alone counts.",
        ) from None
    return None if said is None else tuple(found)
