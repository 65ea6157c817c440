"""The mask of every template on every conversation, against the rule stated anew in this file.

One idea: nothing here is the product's: the rule is written down from `apply_chat_template` alone,
as texts, and what the product made is decoded and compared with it.
"""

import json
import re
from copy import deepcopy
from itertools import product

import numpy as np
import pytest

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.corpus.chat import ChatTokenizer
from stillroom.pipeline.corpus.documents import Document
from tests import chat_templates
from tests.chat_templates import CONVERSATIONS

TEMPLATES = chat_templates.originals()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return chat_templates.save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def spellings(messages):
    """The ways in which one conversation may be written."""
    for as_parts, as_text, no_null in product((False, True), repeat=3):
        spelled = deepcopy(messages)
        for message in spelled:
            for call in message.get("tool_calls", ()) if as_text else ():
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
            if no_null and message["content"] is None:
                message["content"] = ""
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
        words = all(word in text for word in chat_templates.words(name))
        python = (
            "None" in text or "{'type'" in text
        )  # a null, a list of parts as Python prints them
        if words and calls and image and not python:
            return spelled
    return None


def without_image(tokenizer, messages):
    text_only = [
        {**m, "content": [p for p in m["content"] if p["type"] == "text"]} for m in messages
    ]
    return tokenizer.apply_chat_template(text_only, tokenize=False)


def by_the_rule(tokenizer, messages, context):
    """(what is asked, what is said) of each assistant turn, from renderings alone."""
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        options = {"tokenize": False, **context}
        asked = tokenizer.apply_chat_template(messages[:at], add_generation_prompt=True, **options)
        whole = tokenizer.apply_chat_template(messages[: at + 1], **options)
        common = next((i for i, (a, b) in enumerate(zip(asked, whole)) if a != b), len(asked))
        if common < len(asked):  # the prompt opened something that the finished turn lacks
            common -= len(re.search(r"(<[^<>\s]*)?$", asked[:common])[0])
            rest = asked[common:]
            if "</" in rest:  # or closed what the turn fills
                asked = asked[:common]
        yield asked, whole[common:].rstrip()


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
        with pytest.raises(
            CorpusError, match=r"chats\.jsonl:7: the chat template (refuses|does not|writes)"
        ):
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
    assert sum(len(shown) for shown in whole.values()) > 0.8 * len(TEMPLATES) * len(CONVERSATIONS)


HEADERS = {
    "deepseek_r1_distill": "<｜Assistant｜>",
    "deepseekv3": "<｜Assistant｜>",
    "gptoss": "<|start|>assistant",
    "muse_glimmer": "<|start|>assistant",
    "qwen2_5": "\n",
    "qwen3_5_nothink": "<think>\n\n</think>\n\n",
    **dict.fromkeys(("qwen3_5_think", "qwen3_6", "qwen3_8"), "<think>\n"),
    **dict.fromkeys(("nemotron_3_5_lightning", "nemotron_3_nano"), "<think>"),
    **dict.fromkeys(("nemotron_3_super", "nemotron_3_ultra"), "<think>"),
}
"""What TRL's marks begin with although the generation prompt says it already."""
OPENS_THE_NEXT_TURN = {"glm4moe": "<|user|>"}
"""TRL adds to the answer how the model stops, which the family's own template does not write."""


@pytest.mark.parametrize("name", ["plain", "system", "unicode"])
@pytest.mark.parametrize("template", chat_templates.marked())
def test_marks_of_others_differ_from_the_rule_where_they_are_known_to(template, name, tokenizer):
    tokenizer.chat_template = TEMPLATES[template]
    spelled = shown_whole(tokenizer, name)
    if spelled is None:
        pytest.skip("the template does not show this conversation")
    ((_, ours),) = by_the_rule(tokenizer, spelled, {})
    tokenizer.chat_template = chat_templates.marked()[template]
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    made = tokenizer.apply_chat_template(spelled, **options)
    mask = np.asarray(made["assistant_masks"])
    ((_, theirs),) = targets(tokenizer, [(np.asarray(made["input_ids"]), mask)])
    added = OPENS_THE_NEXT_TURN.get(template, "")
    assert theirs.rstrip() == HEADERS.get(template, "") + ours + added


GLM = ("<|user|>", "<|observation|>", "<|endoftext|>")
"""What the family's generation config names as the ends of a text."""


def stopping(tokenizer):
    """What makes examples for a model that stops by opening the next turn."""
    tokenizer.chat_template = TEMPLATES["glm4moe"]
    return ChatTokenizer(tokenizer, tuple(tokenizer.convert_tokens_to_ids(name) for name in GLM))


@pytest.mark.parametrize("name", ["plain", "system", "unicode"])
def test_a_model_that_opens_the_next_turn_is_taught_what_trl_marks(name, tokenizer):
    messages, _ = CONVERSATIONS[name]
    make = stopping(tokenizer)
    made = make(Document("x", messages=tuple(messages)))
    tokenizer.chat_template = chat_templates.marked()["glm4moe"]
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    theirs = tokenizer.apply_chat_template(messages, **options)
    mask = np.asarray(theirs["assistant_masks"])
    (expected,) = targets(tokenizer, [(np.asarray(theirs["input_ids"]), mask)])
    assert list(targets(tokenizer, made)) == [expected]
    assert make.notes["answers_without_an_end_token"] == 0


@pytest.mark.parametrize("name", ["think", "tools", "null", "multi-turn", "empty answer"])
def test_a_model_that_opens_the_next_turn_opens_that_of_whoever_it_waits_for(name, tokenizer):
    messages, context = CONVERSATIONS[name]
    make = stopping(tokenizer)
    made = make(Document("x", messages=tuple(messages), context=context))
    answers = [message for message in messages if message["role"] == "assistant"]
    ends = ["<|observation|>" if "tool_calls" in answer else "<|user|>" for answer in answers]
    said = [text for _, text in targets(tokenizer, made)]
    assert [text[text.rindex("<|") :] for text in said] == ends
    assert all(text.count("<|") == 1 for text in said)
    assert not any("None" in text for text in said)


AS_OBJECTS = [
    chat_templates.user("How cold?"),
    chat_templates.said("", tool_calls=[chat_templates.CALL]),
    chat_templates.tool("") | {"content": {"degrees": -4, "sky": "quite clear"}},
    chat_templates.said("Rather cold."),
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_a_tool_gave_as_an_object_is_shown_whole_or_refused(template, tokenizer):
    """Some templates go through an object's names and leave its values out."""
    tokenizer.chat_template = TEMPLATES[template]
    document = Document(
        "x", messages=tuple(AS_OBJECTS), context={"tools": [chat_templates.WEATHER]}
    )
    try:
        made = ChatTokenizer(tokenizer)(document)
    except CorpusError:
        return
    text = tokenizer.decode(made[-1][0])
    assert "-4" in text
    assert "quite clear" in text
    assert "{'degrees'" not in text
