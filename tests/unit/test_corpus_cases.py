"""Small conversations on which masks went wrong once, from the file to the mask.

One idea: a row in a file, a template, and what comes out of `prepare`, its targets in brackets.
"""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.pipeline.config import Prepare, Source
from stillroom.pipeline.corpus.preparing import prepare
from tests import tiny_models

PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
OPEN = "{{ '<|im_start|>' + m.role + '\n' }}"
SEVERAL_ENDS = (
    "{% for m in messages %}"
    "{% if m.tool_calls %}{{ '[b]assistant>' + m.tool_calls[0].function.name + '[call]' }}"
    "{% elif m.role == 'assistant' %}{{ '[b]assistant ' + m.content + '[stop]' }}"
    "{% else %}{{ '[b]' + m.role + ' ' + m.content + '[end]' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[b]assistant' }}{% endif %}"
)
TWO_ENDS = (
    "{% for m in messages %}" + OPEN + "{{ m.content }}"
    "{% if m.role == 'assistant' %}[end]{% endif %}{{ '<|im_end|>\n' }}{% endfor %}" + PROMPT
)
MARKS_WITHOUT_END = (
    "{% for m in messages %}"
    + OPEN
    + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    + PROMPT
)
MARKS_FROM_THE_START = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endif %}"
    "{% endfor %}"
)
TOOLS = (
    "{% if tools %}{{ '<|im_start|>' + tools | tojson + '<|im_end|>' }}{% endif %}"
    "{% for m in messages %}"
    + OPEN
    + "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}" + PROMPT
)
NULL_CALLS = (
    "{% for m in messages %}"
    + OPEN
    + "{% if m.content is none %}{{ m.tool_calls[0].function.name }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}" + PROMPT
)
THOUGHTS = (
    "{% for m in messages %}" + OPEN + "{{ m.content if loop.last else m.content.split('|')[-1] }}"
    "{{ '<|im_end|>\n' }}{% endfor %}" + PROMPT
)
U, A, E = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"


def user(text):
    return {"role": "user", "content": text}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


def call(**arguments):
    return {"type": "function", "function": {"name": "sum", "arguments": arguments}}


def tool(text):
    return {"role": "tool", "content": text}


CALLS = [user("Add."), said("", tool_calls=[call(a=1)]), tool("3"), said("Three.")]
CALLED = f'{U}Add.{E}\n{A}⟦{{"name": "sum", "arguments": {{"a": 1}}}}{E}⟧\n'
CALLED += f"<|im_start|>tool\n3{E}\n{A}⟦Three.{E}⟧\n"
AS_TEXT = [user("Add."), said("", tool_calls=[call()]), tool("3"), said("Three.")]
AS_TEXT[1]["tool_calls"][0]["function"]["arguments"] = '{"a": 1}'
NULL = [user("Add."), said(None, tool_calls=[call(a=1)]), tool("3"), said("Three.")]
DECLARED = [{"type": "function", "function": {"name": "sum", "default": None}}]

CASES = {
    "several end tokens": (
        SEVERAL_ENDS,
        {"messages": CALLS},
        ["[b]user Add.[end][b]assistant⟦>sum[call]⟧[b]tool 3[end][b]assistant⟦ Three.[stop]⟧"],
    ),
    "an end behind another": (
        TWO_ENDS,
        {"messages": [user("2+2?"), said("4")]},
        [f"{U}2+2?{E}\n{A}⟦4[end]{E}⟧\n"],
    ),
    "marks that end inside a character": (
        MARKS_WITHOUT_END,
        {"messages": [user("Smile."), said("ok 🙂")]},
        [f"{U}Smile.{E}\n{A}⟦ok 🙂{E}⟧\n"],
    ),
    "marks from the first token on": (
        MARKS_FROM_THE_START,
        {"messages": [said("One"), user("And?"), said("Two")]},
        [f"⟦One⟧<|im_start|>And?{E}⟦Two⟧"],
    ),
    "tools in a column": (
        TOOLS,
        {"messages": CALLS, "tools": DECLARED},
        [f"<|im_start|>{json.dumps(DECLARED)}{E}{CALLED}"],
    ),
    "arguments as text": (TOOLS, {"messages": AS_TEXT}, [CALLED]),
    "no content beside a call": (
        NULL_CALLS,
        {"messages": NULL},
        [f"{U}Add.{E}\n{A}⟦sum{E}⟧\n<|im_start|>tool\n3{E}\n{A}⟦Three.{E}⟧\n"],
    ),
    "two answers alike": (
        THOUGHTS,
        {"messages": [user("Red?"), said("hm|Yes."), user("Round?"), said("hm|Yes.")]},
        [
            f"{U}Red?{E}\n{A}⟦hm|Yes.{E}⟧\n",
            f"{U}Red?{E}\n{A}Yes.{E}\n{U}Round?{E}\n{A}⟦hm|Yes.{E}⟧\n",
        ],
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer = tiny_models.save_tokenizer(directory, chat_template="{{ messages }}")
    ends = ["[b]", "[end]", "[call]", "[stop]"]
    tokenizer.add_special_tokens({"additional_special_tokens": ends})
    tokenizer.save_pretrained(directory)
    return directory, tokenizer


def framed(tokenizer, example) -> str:
    """An example with its targets in brackets."""
    ids, mask = example.token_ids, example.loss_mask
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]]).astype(int)))
    text, last = "", 0
    for begin, end in zip(edges[::2], edges[1::2]):
        text += tokenizer.decode(ids[last:begin]) + "⟦" + tokenizer.decode(ids[begin:end]) + "⟧"
        last = end
    return text + tokenizer.decode(ids[last:])


def examples(model, tmp_path, template, path):
    directory, tokenizer = model
    (tmp_path / "own.jinja").write_text(template)
    settings = {"tokenizer": str(directory), "chat_template": str(tmp_path / "own.jinja")}
    config = Prepare(source=(Source(name="s", path=str(path)),), heldout=0.0, **settings)
    corpus = prepare(config, "", tmp_path / "corpus")
    return [framed(tokenizer, example) for example in corpus.split("train")], corpus.facts


@pytest.mark.parametrize("name", CASES)
def test_what_is_learned(name, model, tmp_path):
    template, row, expected = CASES[name]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    made, facts = examples(model, tmp_path, template, tmp_path / "rows.jsonl")
    assert made == expected
    differ = facts["chats"].get("marks_that_differ_from_the_rule", 0)
    assert differ == (name == "marks that end inside a character")


def test_calls_of_different_arguments_share_no_nulls_of_a_parquet_file(model, tmp_path):
    other = [user("Add."), said("", tool_calls=[call(b="x")]), tool("3"), said("Three.")]
    table = pa.Table.from_pylist([{"messages": CALLS}, {"messages": other}])
    pq.write_table(table, tmp_path / "rows.parquet")
    made, _ = examples(model, tmp_path, TOOLS, tmp_path / "rows.parquet")
    assert made == [CALLED, CALLED.replace('"a": 1', '"b": "x"')]
