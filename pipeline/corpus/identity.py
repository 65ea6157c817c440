"""What a corpus follows from, and what names it.

One idea: equal identities need no second preparation, and a digest covers the examples and all that
gives them their meaning. Whatever changes a token or a mask is in the examples' own ids; whatever
may change them is here.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.config import Prepare
from stillroom.pipeline.corpus.chat import ChatSettings
from stillroom.pipeline.corpus.documents import Document, OpenSource
from stillroom.pipeline.corpus.files import Corpus
from stillroom.pipeline.corpus.splits import canonical_json
from stillroom.pipeline.corpus.tokenizer import CorpusTokenizer
from stillroom.pipeline.images import image_sha256

RULE = "turns as the generation prompt asks for them, up to what stops the model"
"""How masks are made. A corpus in a run's directory that was made by another rule is made anew;
elsewhere it stays readable."""


def chat_settings(config: Prepare) -> ChatSettings:
    """What a run says about its conversations."""
    arguments = tuple(config.template.items())
    return ChatSettings(config.chat_template, arguments, config.turns, config.leave_out)


def identity(
    config: Prepare, tokenizer: CorpusTokenizer, sources: Sequence[OpenSource]
) -> dict[str, Any]:
    """Everything that the result follows from."""
    settings = config.model_dump(mode="json", exclude={"tokenizer"}, exclude_none=True)
    facts = [source.facts for source in sources]
    made = {"tokenizer": tokenizer.facts, "settings": settings, "sources": facts, "rule": RULE}
    made |= edges(config, tokenizer) | {"stop_ids": list(tokenizer.stop_ids)}
    if config.chat_template:
        template = tokenizer.chat.template.source.encode()
        made["own_chat_template_sha256"] = hashlib.sha256(template).hexdigest()
    return made


def meaning(config: Prepare) -> dict[str, Any]:
    """Settings that the digest covers beside the examples."""
    return config.model_dump(include={"window", "overlap", "min_tokens", "heldout", "seed"})


def edges(config: Prepare, tokenizer: CorpusTokenizer) -> dict[str, Any]:
    """What stands before and behind texts; a corpus where nothing does has the digest it had."""
    begin = {"begin_ids": list(tokenizer.begin_ids)} if tokenizer.begin_ids else {}
    return begin | ({"end_of_text": tokenizer.hf.eos_token_id} if config.end_of_text else {})


def unchanged(directory: Path, identity: dict[str, Any]) -> Corpus | None:
    """The corpus that is there, if it follows from the same."""
    try:
        corpus = Corpus.open(directory)
    except CorpusError:
        return None
    if "processor" in corpus.facts:
        return None  # image files lie outside the sources' hashes
    same = all(
        corpus.facts.get(key) == json.loads(canonical_json(v)) for key, v in identity.items()
    )
    return corpus if same else None


def document_digest(document: Document) -> str:
    """The first 32 hex digits of sha256 over a document's text or messages and image hashes."""
    content = document.text.encode() if document.text else canonical_json(list(document.messages))
    if document.teacher_messages:
        content += canonical_json(list(document.teacher_messages))
    if document.context:
        content += canonical_json(document.context)
    for data in document.images:
        content += image_sha256(data).encode()
    return hashlib.sha256(content).hexdigest()[:32]
