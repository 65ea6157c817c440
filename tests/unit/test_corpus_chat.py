"""Conversations: which tokens are the assistant's, exactly."""

import json

import numpy as np
import pytest

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.config import Prepare, Source
from stillroom.pipeline.corpus.chat import ChatTokenizer
from stillroom.pipeline.corpus.documents import Document
from stillroom.pipeline.corpus.preparing import prepare
from tests import tiny_models

CHAT = (
    {"role": "system", "content": "You answer questions about Python."},
    {"role": "user", "content": "What is a with statement?"},
    {"role": "assistant", "content": "It wraps a block with methods of a context manager."},
    {"role": "user", "content": "yes"},
    {"role": "assistant", "content": "yes"},
)
AFTER_A_SPACE = " It wraps a block with methods of a context manager.{end} yes{end}"
"""The space that ends the prompt is part of the answer's first token."""
SPOKEN = "It wraps a block with methods of a context manager.<|im_end|>yes<|im_end|>"

NO_END_MARKS = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
THINKS_IN_THE_LAST_TURN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ 'think think ' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHOUTS = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
REFUSES = "{{ raise_exception('Only user and assistant roles are supported') }}"


def tokenise(tokenizer, template: str, messages=CHAT, **more):
    tokenizer.chat_template = template
    return ChatTokenizer(tokenizer, **more)(Document("chats.jsonl:7", messages=messages))


@pytest.fixture
def tokenizer(tiny_llama):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


def spoken(tokenizer, made) -> str:
    ids, mask = made
    assert ids.dtype == np.int32
    assert ids.shape == mask.shape
    return tokenizer.decode(ids[mask])


def test_templates_with_generation_blocks_are_believed(tokenizer):
    assert spoken(tokenizer, tokenise(tokenizer, tiny_models.CHAT_TEMPLATE)) == SPOKEN


def test_spans_found_in_the_text_equal_the_templates_own_marks(tokenizer):
    marked = tokenise(tokenizer, tiny_models.CHAT_TEMPLATE)
    found = tokenise(tokenizer, tiny_models.PLAIN_CHAT_TEMPLATE)
    assert np.array_equal(marked[0], found[0])
    assert np.array_equal(marked[1], found[1])


def test_a_turn_without_an_end_token_ends_with_its_text(tokenizer):
    made = tokenise(tokenizer, NO_END_MARKS)
    assert spoken(tokenizer, made) == AFTER_A_SPACE.format(end="")


def test_end_tokens_of_the_generation_config_count(tokenizer):
    template = NO_END_MARKS.replace("'\n'", "'<image>\n'")
    image = tokenizer.convert_tokens_to_ids("<image>")
    made = tokenise(tokenizer, template, end_ids=(image,))
    assert spoken(tokenizer, made) == AFTER_A_SPACE.format(end="<image>")


def test_what_a_template_puts_before_an_answer_is_the_models_own(tokenizer):
    made = tokenise(tokenizer, THINKS_IN_THE_LAST_TURN)
    first, last = SPOKEN.split("yes")
    assert spoken(tokenizer, made) == f"{first}think think yes{last}"


def test_a_conversation_may_begin_with_the_assistant(tokenizer):
    made = tokenise(tokenizer, tiny_models.PLAIN_CHAT_TEMPLATE, CHAT[2:4])
    assert spoken(tokenizer, made) == SPOKEN.removesuffix("yes<|im_end|>")


def test_absent_fields_are_absent_for_the_template(tokenizer):
    with_nulls = tuple(message | {"tool_calls": None} for message in CHAT)
    plain = tokenise(tokenizer, tiny_models.PLAIN_CHAT_TEMPLATE)
    made = tokenise(tokenizer, tiny_models.PLAIN_CHAT_TEMPLATE, with_nulls)
    assert np.array_equal(plain[0], made[0])
    assert np.array_equal(plain[1], made[1])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (SHOUTS, r"chats\.jsonl:7: message 3 cannot be found again"),
        (REFUSES, r"chats\.jsonl:7: the chat template refuses .*Only user and assistant"),
        ("", "no chat template"),
    ],
)
def test_templates_that_cannot_be_used_are_refused(template, message, tokenizer):
    with pytest.raises(CorpusError, match=message):
        tokenise(tokenizer, template)


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_qwen3"])
def test_chats_become_examples(model, request, tmp_path, tokenizer):
    path = tmp_path / "chats.jsonl"
    chats = [[dict(m) for m in CHAT], [dict(m) for m in CHAT[1:3]], [dict(m) for m in CHAT[:2]]]
    path.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    source = Source(name="chat", kind="jsonl", path=str(path), messages_column="messages")
    config = Prepare(source=(source,), heldout=0.0)
    corpus = prepare(config, str(request.getfixturevalue(model)), tmp_path / "corpus")
    made = [tokenizer.decode(e.token_ids[e.loss_mask]) for e in corpus.split("train")]
    assert made == [SPOKEN, SPOKEN.removesuffix("yes<|im_end|>")]
    assert corpus.facts["dropped"] == {"windows_without_targets": 1}
    assert "<|im_start|>" in corpus.facts["chat_template"]
