"""Conversations: which tokens are the assistant's, exactly, and what becomes of the turns."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.cache_schemas.errors import ConfigError, CorpusError
from stillroom.pipeline.config import Prepare, Source
from stillroom.pipeline.corpus.chat import ChatSettings, ChatTokenizer
from stillroom.pipeline.corpus.documents import Document
from stillroom.pipeline.corpus.preparing import prepare
from stillroom.pipeline.corpus.spans import runs_of
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
PLAIN = tiny_models.PLAIN_CHAT_TEMPLATE
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
STRIPS_THOUGHTS = PLAIN.replace(
    "{{ message['content']",
    "{% set c = message['content'] %}{{ (c if loop.last else c.split('/')[-1])",
)
SHOUTS = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
REFUSES = "{{ raise_exception('Only user and assistant roles are supported') }}"
ASKED = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def examples(tokenizer, template: str, messages=CHAT, settings=None, context=None, **more):
    tokenizer.chat_template = template
    make = ChatTokenizer(tokenizer, settings=settings, **more)
    return make(Document("chats.jsonl:7", messages=messages, context=context or {}))


def tokenise(tokenizer, template: str, messages=CHAT, **more):
    (made,) = examples(tokenizer, template, messages, **more)
    return made


@pytest.fixture
def tokenizer(tiny_llama):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


def spoken(tokenizer, made) -> str:
    ids, mask = made
    assert ids.dtype == np.int32
    assert ids.shape == mask.shape
    return tokenizer.decode(ids[mask])


def framed(tokenizer, made) -> str:
    """An example with its targets in brackets."""
    ids, mask = made
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]]).astype(int)))
    text, last = "", 0
    for begin, end in zip(edges[::2], edges[1::2]):
        text += tokenizer.decode(ids[last:begin]) + "⟦" + tokenizer.decode(ids[begin:end]) + "⟧"
        last = end
    return text + tokenizer.decode(ids[last:])


def user(text):
    return {"role": "user", "content": text}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


def test_marks_and_the_rule_agree_where_marks_hold_a_whole_turn(tokenizer):
    assert spoken(tokenizer, tokenise(tokenizer, tiny_models.CHAT_TEMPLATE)) == SPOKEN
    marked = tokenise(tokenizer, tiny_models.CHAT_TEMPLATE)
    found = tokenise(tokenizer, PLAIN)
    assert np.array_equal(marked[0], found[0])
    assert np.array_equal(marked[1], found[1])


@pytest.mark.parametrize(
    ("marks", "differ"),
    [
        ("{% generation %}{{ c + '<|im_end|>' }}{% endgeneration %}", 0),
        ("{% generation %}{{ c }}{% endgeneration %}{{ '<|im_end|>' }}", 1),
        ("{% generation %}{{ c[2:] + '<|im_end|>' }}{% endgeneration %}", 1),
    ],
)
def test_marks_that_differ_from_the_rule_lose_and_are_counted(marks, differ, tokenizer):
    start = (
        "{% for m in messages %}{% set c = m['content'] %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    )
    if "[2:]" in marks:
        marks = "{{ c[:2] }}" + marks
    other = "{% else %}{{ c + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    prompt = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    tokenizer.chat_template = start + "{% if m['role'] == 'assistant' %}" + marks + other + prompt
    make = ChatTokenizer(tokenizer)
    (made,) = make(Document("x", messages=CHAT))
    assert spoken(tokenizer, made) == SPOKEN
    assert make.notes["marks_that_differ_from_the_rule"] == differ


def test_a_turn_without_an_end_token_ends_with_its_text(tokenizer):
    made = tokenise(tokenizer, NO_END_MARKS)
    assert spoken(tokenizer, made) == AFTER_A_SPACE.format(end="")


def test_end_tokens_of_the_generation_config_count(tokenizer):
    template = NO_END_MARKS.replace("'\n'", "'<image>\n'")
    image = tokenizer.convert_tokens_to_ids("<image>")
    made = tokenise(tokenizer, template, end_ids=(image,))
    assert spoken(tokenizer, made) == AFTER_A_SPACE.format(end="<image>")


OPENS_THE_NEXT_TURN = (
    "{% for m in messages %}"
    "{{ {'user': '<|im_start|>', 'tool': '<|endoftext|>', 'assistant': '<image>'}[m.role] }}"
    "{% if m.tool_calls %}{{ '(' + m.tool_calls[0].function.name + ')' }}{% endif %}"
    "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<image>{% endif %}"
)
"""No turn has an end: models stop with the token of whoever speaks next."""
WEATHER = [{"id": "c1", "type": "function", "function": {"name": "w", "arguments": {"a": 1}}}]


@pytest.mark.parametrize(
    ("chat", "expected"),
    [
        ((user("a"), said("b")), "<|im_start|>a<image>⟦b<|im_start|>⟧"),
        (
            (user("a"), said("b"), user("c"), said("d")),
            "<|im_start|>a<image>⟦b<|im_start|>⟧c<image>⟦d<|im_start|>⟧",
        ),
        ((user("a"), said("")), "<|im_start|>a<image>⟦<|im_start|>⟧"),
        (
            (user("a"), said("", tool_calls=WEATHER), {"role": "tool", "content": "c"}, said("d")),
            "<|im_start|>a<image>⟦(w)<|endoftext|>⟧c<image>⟦d<|im_start|>⟧",
        ),
        (
            (user("a"), said("", tool_calls=WEATHER)),
            "<|im_start|>a<image>⟦(w)<|endoftext|>⟧",
        ),
        (
            (user("a"), said("call me <|im_start|>")),
            "<|im_start|>a<image>⟦call me <|im_start|>⟧",
        ),
    ],
)
def test_a_model_that_stops_by_opening_the_next_turn_learns_it(chat, expected, tokenizer):
    names = ("<|im_start|>", "<|endoftext|>")
    ends = tuple(tokenizer.convert_tokens_to_ids(name) for name in names)
    tokenizer.chat_template = OPENS_THE_NEXT_TURN
    make = ChatTokenizer(tokenizer, ends)
    (made,) = make(Document("x", messages=chat))
    assert framed(tokenizer, made) == expected
    assert make.notes["answers_without_an_end_token"] == 0


def test_what_a_template_puts_before_an_answer_is_the_models_own(tokenizer):
    first, second = examples(tokenizer, THINKS_IN_THE_LAST_TURN)
    one, other = SPOKEN.split("yes")
    assert spoken(tokenizer, first) == f"think think {one}"
    assert spoken(tokenizer, second) == f"think think yes{other}"
    assert one.removesuffix("<|im_end|>") in tokenizer.decode(second[0][~second[1]])


def test_a_conversation_may_begin_with_the_assistant(tokenizer):
    made = tokenise(tokenizer, PLAIN, CHAT[2:4])
    assert spoken(tokenizer, made) == SPOKEN.removesuffix("yes<|im_end|>")


def test_an_answer_that_no_template_asks_for_is_only_read(tokenizer):
    template = "{{ messages[0]['role'][:0] }}" + PLAIN
    made = tokenise(tokenizer, template, (said("Hello."), user("Well?"), said("Well.")))
    assert spoken(tokenizer, made) == "Well.<|im_end|>"


def test_absent_fields_are_absent_for_the_template(tokenizer):
    with_nulls = tuple(message | {"tool_calls": None} for message in CHAT)
    plain, made = tokenise(tokenizer, PLAIN), tokenise(tokenizer, PLAIN, with_nulls)
    assert np.array_equal(plain[0], made[0])
    assert np.array_equal(plain[1], made[1])


OPENS_A_THOUGHT = PLAIN.replace("assistant\n' }}", "assistant\n<t>\n' }}")


@pytest.mark.parametrize("answer", ["4", "<b>4</b>", "<u>4", "think"])
def test_what_the_prompt_opens_is_the_prompts_own(answer, tokenizer):
    made = tokenise(tokenizer, OPENS_A_THOUGHT, (user("2+2?"), said(answer)))
    assert framed(tokenizer, made) == ASKED.format("2+2?") + f"<t>\n⟦{answer}<|im_end|>⟧\n"


def test_a_turn_that_fills_what_its_prompt_closed_is_shown_without_that_prompt(tokenizer):
    template = PLAIN.replace("assistant\n' }}", "assistant\n<t>\n\n</t>\n\n' }}")
    tokenizer.chat_template = template
    make = ChatTokenizer(tokenizer)
    (made,) = make(Document("x", messages=(user("2+2?"), said("<t>\nadd\n</t>\n\n4"))))
    assert framed(tokenizer, made) == ASKED.format("2+2?") + "<t>\n⟦add\n</t>\n\n4<|im_end|>⟧\n"
    assert make.notes["answers_after_a_prompt_that_says_otherwise"] == 1


def test_an_answer_is_asked_for_with_the_tokens_of_its_prompt(tokenizer):
    """A line break that ends the prompt is no part of the answer's first token."""
    tokenizer.add_tokens(["\n\n"])
    template = PLAIN.replace(
        "+ '\n' }}", "+ '\n' }}{% if message['role'] == 'assistant' %}{{ '\n' }}{% endif %}"
    )
    made = tokenise(tokenizer, template, (user("2+2?"), said("4")))
    prompt = tokenizer(ASKED.format("2+2?"), add_special_tokens=False)["input_ids"]
    assert made[0][: len(prompt)].tolist() == prompt
    assert int(np.argmax(made[1])) == len(prompt)


CHOICES = {
    "auto": ["⟦a/A.⟧", "A.⟦b/B.⟧", "A.B.⟦c/C.⟧"],
    "each": ["⟦a/A.⟧", "A.⟦b/B.⟧", "A.B.⟦c/C.⟧"],
    "together": ["A.B.⟦c/C.⟧"],
    "last": ["A.B.⟦c/C.⟧"],
}


@pytest.mark.parametrize("choice", CHOICES)
def test_turns_that_later_turns_change_are_examples_of_their_own(choice, tokenizer):
    chat = tuple(m for x in "abc" for m in (user("?"), said(f"{x}/{x.upper()}.")))
    made = examples(tokenizer, STRIPS_THOUGHTS, chat, ChatSettings(turns=choice))
    frame = str.maketrans({"\n": "", "?": ""})
    texts = [framed(tokenizer, one) for one in made]
    for tag in ("<|im_start|>user", "<|im_start|>assistant", "<|im_end|>"):
        texts = [text.replace(tag, "") for text in texts]
    assert [text.translate(frame) for text in texts] == CHOICES[choice]


def test_turns_are_together_where_that_shows_the_same(tokenizer):
    for choice, number in {"auto": 1, "together": 1, "each": 2, "last": 1}.items():
        made = examples(tokenizer, PLAIN, settings=ChatSettings(turns=choice))
        targets = [spoken(tokenizer, one) for one in made]
        assert len(made) == number
        assert "".join(targets) == (SPOKEN if choice != "last" else "yes<|im_end|>")


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"training": 0}])
def test_an_answer_may_be_left_out_by_its_flag(flag, tokenizer):
    chat = (*CHAT[:2], CHAT[2] | flag, *CHAT[3:])
    assert spoken(tokenizer, tokenise(tokenizer, PLAIN, chat)) == "yes<|im_end|>"
    chat = (*CHAT[:4], CHAT[4] | flag)
    first = SPOKEN.removesuffix("yes<|im_end|>")
    assert spoken(tokenizer, tokenise(tokenizer, PLAIN, chat)) == first


def test_rules_for_odd_conversations_are_counted(tokenizer):
    tokenizer.chat_template = PLAIN
    make = ChatTokenizer(tokenizer)
    assert make(Document("x", messages=CHAT[:2])) == []
    (twice,) = make(Document("x", messages=(user("?"), said("a"), said("b"))))
    assert spoken(tokenizer, twice) == "a<|im_end|>b<|im_end|>"
    (empty,) = make(Document("x", messages=(user("?"), said(" "))))
    assert spoken(tokenizer, empty) == " <|im_end|>"
    assert make.notes["conversations_without_an_assistant_turn"] == 1
    assert make.notes["answers_that_follow_an_answer"] == 1
    assert make.notes["empty_answers"] == 1


CALLS = [{"type": "function", "function": {"name": "w", "arguments": '{"city": "Oslo"}'}}]


@pytest.mark.parametrize(
    ("template", "messages", "context", "message"),
    [
        (REFUSES, CHAT, {}, r"the chat template refuses .*Only user and assistant"),
        (
            PLAIN,
            (user("?"), said("", tool_calls=CALLS)),
            {},
            "does not show tool_calls of message 2",
        ),
        (
            PLAIN,
            CHAT[1:3],
            {"tools": [{"name": "w"}]},
            r'does not show tools.*leave_out = \["tools"\]',
        ),
        (
            PLAIN,
            (user("?"), said("a", reasoning_content="b")),
            {},
            "does not show reasoning_content",
        ),
        (
            PLAIN.replace("message in messages", "message in messages[-1:]"),
            CHAT,
            {},
            "the content of",
        ),
        (PLAIN, (user("?"), said("a", weight=0.5)), {}, r"weight = 0\.5; expected 0 or 1"),
        (
            PLAIN,
            (user("?"), said("", tool_calls=[{"name": "w", "arguments": "{"}])),
            {},
            "not JSON",
        ),
    ],
)
def test_what_cannot_be_shown_whole_is_refused(template, messages, context, message, tokenizer):
    with pytest.raises(CorpusError, match=rf"(?s)chats\.jsonl:7: .*{message}"):
        examples(tokenizer, template, messages, context=context)


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


BARE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or () %}({{ c.function.name }} {{ c.function.arguments }})"
    "{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
)
"""It prints whatever it is given."""
CALLED = [{"function": {"name": "w", "arguments": {"a": "it's"}}}]


@pytest.mark.parametrize(
    ("chat", "before", "answer"),
    [
        ((user(parts("a", "b")), said(parts("c"))), "user: ab", " c"),
        ((user("a"), said(None)), "user: a", " "),
        ((user("a"), said("", tool_calls=CALLED)), "user: a", ' (w {"a": "it\'s"})'),
        (
            (user("a"), {"role": "tool", "content": {"t": [-4, "x"]}}, said("c")),
            'user: a<|im_end|><|im_start|>tool: {"t": [-4, "x"]}',
            " c",
        ),
    ],
    ids=["parts", "null", "arguments", "what a tool gave"],
)
def test_nothing_is_written_in_pythons_notation(chat, before, answer, tokenizer):
    made = tokenise(tokenizer, BARE, chat)
    assert framed(tokenizer, made) == (
        f"<|im_start|>{before}<|im_end|><|im_start|>assistant:⟦{answer}<|im_end|>⟧"
    )


def test_a_content_that_only_python_could_write_is_refused(tokenizer):
    with pytest.raises(CorpusError, match="Python's notation"):
        tokenise(tokenizer, BARE, (user({"a": 1}), said("b")))


def test_roles_that_nobody_knows_are_refused_unless_the_template_names_them(tokenizer):
    chat = (user("a"), {"role": "asistant", "content": "b"}, said("c"))
    with pytest.raises(CorpusError, match=r"message 2 has the role 'asistant'.*'assistant'\?"):
        tokenise(tokenizer, PLAIN, chat)
    named = "{# asistant #}" + PLAIN
    assert spoken(tokenizer, tokenise(tokenizer, named, chat)) == "c<|im_end|>"


def test_arguments_that_a_template_leaves_out_are_told(tokenizer):
    only_names = PLAIN.replace(
        "{% for message in messages %}",
        "{% for message in messages %}{% for c in message.tool_calls or () %}"
        "{{ c.function.name }}{% endfor %}",
    )
    tokenizer.chat_template = only_names
    make = ChatTokenizer(tokenizer)
    make(Document("x", messages=(user("a"), said("", tool_calls=CALLED))))
    assert make.notes["conversations_whose_arguments_the_template_drops"] == 1


def test_a_refusal_counts_the_messages_of_the_whole_conversation(tokenizer):
    chat = tuple(m for n in range(20) for m in (user(f"{n}?"), said(f"{n}.")))
    chat = (*chat, user("?"), said("a", reasoning_content="b"))
    with pytest.raises(CorpusError, match="does not show reasoning_content of message 42"):
        tokenise(tokenizer, PLAIN, chat)


def test_an_end_that_does_not_stop_the_model_is_told(tokenizer):
    made = PLAIN.replace("<|im_end|>", "<|endoftext|>")
    tokenizer.chat_template = made
    make = ChatTokenizer(tokenizer)
    (one,) = make(Document("x", messages=(user("a"), said("b"))))
    assert spoken(tokenizer, one) == "b<|endoftext|>"
    assert make.notes["answers_that_end_without_stopping"] == 1


PIECES = [*"ab \n<é🙂", "\u0301", "\u200d", "ש", "\0", "<|im_end|>", "the word"]


@given(st.lists(st.sampled_from(PIECES), max_size=30), st.data())
def test_tokens_found_by_halving_are_those_that_hold_the_characters(tiny_tokenizer, pieces, data):
    text = "".join(pieces)
    made = tiny_tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    edges = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=4)))
    spans = list(zip(edges[::2], edges[1::2]))
    mask, joined = runs_of(made.token_to_chars, len(made.ids), spans)
    held = [any(b < end and e > start for start, end in spans) for b, e in made.offsets]
    assert mask.tolist() == held
    cut = [start for start, _ in spans if any(b < start < e for b, e in made.offsets)]
    assert joined == cut


def test_parts_may_be_left_out_by_name(tokenizer):
    chat = (user("?"), said("a", reasoning_content="b"))
    settings = ChatSettings(leave_out=("reasoning_content", "tools"))
    made = tokenise(tokenizer, PLAIN, chat, settings=settings, context={"tools": [{"name": "w"}]})
    assert spoken(tokenizer, made) == "a<|im_end|>"


def test_a_tokenizer_without_a_template_is_refused(tokenizer):
    with pytest.raises(CorpusError, match="no chat template"):
        tokenise(tokenizer, "")


def test_arguments_and_a_template_of_ones_own(tokenizer, tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text("{% if loud %}{{ '!' }}{% endif %}" + PLAIN)
    settings = ChatSettings(path=str(path), arguments=(("loud", True),))
    made = tokenise(tokenizer, SHOUTS, settings=settings)
    assert tokenizer.decode(made[0]).startswith("!<|im_start|>")
    with pytest.raises(ConfigError, match=r"no argument 'lout'.*Did you mean 'loud'"):
        examples(tokenizer, PLAIN, settings=ChatSettings(str(path), (("lout", True),)))
    path.write_text("{% for %}")
    with pytest.raises(CorpusError, match=r"own\.jinja: is no Jinja template"):
        examples(tokenizer, PLAIN, settings=ChatSettings(str(path)))


def test_a_rewritten_history_stays_as_the_prompt_shows_it(tokenizer):
    """A final answer takes the thought of an earlier call away; asked for it, the model saw it."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m.thinking and not (messages[-1].role == 'assistant' and not loop.last) %}"
        "{{ m.thinking + '/' }}{% endif %}{{ m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    chat = (user("q"), said("call", thinking="why"), user("out"), said("end"))
    made = framed(tokenizer, tokenise(tokenizer, template, chat))
    assert "assistant\n⟦why/call<|im_end|>⟧<|im_start|>user" in made
    assert made.endswith("assistant\n⟦end<|im_end|>⟧")


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
    assert corpus.facts["chats"]["conversations_without_an_assistant_turn"] == 1
    assert "<|im_start|>" in corpus.facts["chat_template"]
