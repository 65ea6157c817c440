"""The mask of every template on every conversation, against the rule stated anew in this file.

One idea: nothing here is the product's: the rule is written down from `apply_chat_template` alone,
as texts, and what the product made is decoded and compared with it.
"""

import json
import os.path
import re
from copy import deepcopy

import numpy as np
import pytest

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.corpus.chat import ChatTokenizer
from stillroom.pipeline.corpus.documents import Document
from tests import chat_templates
from tests.chat_templates import CONVERSATIONS

TEMPLATES = chat_templates.originals()
STOPS = ("<|im_end|>",)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return chat_templates.save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def spellings(messages):
    """The ways in which one conversation may be written: arguments as text, contents as parts."""
    for as_parts in (False, True):
        for as_text in (False, True):
            spelled = deepcopy(messages)
            for message in spelled:
                for call in message.get("tool_calls", ()) if as_text else ():
                    call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
                if as_parts and isinstance(message["content"], str):
                    message["content"] = [{"type": "text", "text": message["content"]}]
            yield spelled


def shown_whole(tokenizer, name):
    """A conversation in the first spelling that the template shows all of; None without one."""
    messages, context = CONVERSATIONS[name]
    for spelled in spellings(messages):
        try:
            text = tokenizer.apply_chat_template(spelled, tokenize=False, **context)
        except Exception:
            continue
        calls = "weather" in name or not context or text.count("weather") > 1
        image = name != "image" or text != without_image(tokenizer, spelled)
        if all(word in text for word in chat_templates.words(name)) and calls and image:
            return spelled
    return None


def without_image(tokenizer, messages):
    text_only = [{**m, "content": [p for p in m["content"] if p["type"] == "text"]} for m in messages]
    return tokenizer.apply_chat_template(text_only, tokenize=False)


def by_the_rule(tokenizer, messages, context):
    """(what is asked, what is said) of each assistant turn, from renderings alone."""
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        options = {"tokenize": False, **context}
        asked = tokenizer.apply_chat_template(messages[:at], add_generation_prompt=True, **options)
        whole = tokenizer.apply_chat_template(messages[: at + 1], **options)
        common = len(os.path.commonprefix([asked, whole]))
        if common < len(asked):  # the prompt opened something that the finished turn lacks
            common -= len(re.search(r"(<[^<>\s]*)?$", asked[:common])[0])
            rest = asked[common:]
            if "</" in rest:  # or closed what the turn fills
                asked = asked[:common]
        yield asked, upto_the_end(tokenizer, whole[common:])


def upto_the_end(tokenizer, said):
    """A turn without the white space behind its last special token (or its last word)."""
    return said.rstrip()


def targets(tokenizer, made):
    """(what stands before, what is masked) of each run of targets, decoded."""
    for ids, mask in made:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]]).astype(int)))
        for begin, end in zip(edges[::2], edges[1::2]):
            yield tokenizer.decode(ids[:begin]), tokenizer.decode(ids[begin:end])


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_mask_is_what_the_model_would_have_to_write(template, name, tokenizer):
    tokenizer.chat_template = TEMPLATES[template]
    messages, context = CONVERSATIONS[name]
    document = Document("chats.jsonl:7", messages=tuple(messages), context=context)
    spelled = shown_whole(tokenizer, name)
    if spelled is None:
        with pytest.raises(CorpusError, match="chats.jsonl:7: the chat template (refuses|does not)"):
            ChatTokenizer(tokenizer)(document)
        return
    made = ChatTokenizer(tokenizer)(document)
    assert sorted(targets(tokenizer, made)) == sorted(by_the_rule(tokenizer, spelled, context))


def test_most_templates_show_most_conversations(tokenizer):
    whole = {}
    for template in TEMPLATES:
        tokenizer.chat_template = TEMPLATES[template]
        shown = [name for name in CONVERSATIONS if shown_whole(tokenizer, name) is not None]
        whole[template] = shown
    assert len(TEMPLATES) >= 40
    assert all({"plain", "multi-turn", "think", "code", "long"} <= {*s} for s in whole.values())
    print({t: sorted({*CONVERSATIONS} - {*s}) for t, s in whole.items()})
    assert sum(len(shown) for shown in whole.values()) > 0.8 * len(TEMPLATES) * len(CONVERSATIONS)
