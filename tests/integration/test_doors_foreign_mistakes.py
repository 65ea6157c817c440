"""Foreign files that are wrong in the ways that files are: refused by file and row, or read right.

One idea: whatever is wrong with a source, nothing is written, the message says where, and no
library's own exception comes out.
"""

import gzip
import json
from dataclasses import replace
from itertools import count

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from stillroom.cache_schemas.errors import StillroomError
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.doors.foreign import Origin, import_answers
from stillroom.pipeline.doors.leaving import export
from stillroom.pipeline.doors.sources import columns_of, source_of
from stillroom.stages.__main__ import run
from tests import memory_cache


def taken(form, source, target, tokenizer, **more):
    found = source_of(form, source, str(tokenizer))
    origin = Origin(form, "a teacher", str(tokenizer), lossy=found.lossy, **more)
    import_answers(found.read, origin, target, 4)
    return TeacherCache.open(target)


def refused(form, source, target, tokenizer, message, **more):
    with pytest.raises(StillroomError, match=message):
        taken(form, source, target, tokenizer, **more)
    assert not target.exists()


# ---- vLLM's prompt_logprobs ----


def entry(told) -> dict:
    return {str(word): {"logprob": value, "rank": rank} for word, value, rank in told}


def dump(tokens=(5, 6, 7), entries=None, **more) -> dict:
    """The tokens at -0.5 and one other at -1.5, unless `entries` say what there is."""
    usual = [None, *(entry([(token, -0.5, 1), (9, -1.5, 2)]) for token in tokens[1:])]
    told = usual if entries is None else entries
    return {"prompt_token_ids": list(tokens), "prompt_logprobs": told} | more


LAST = entry([(7, -0.5, 1)])
NAN, INFINITE = float("nan"), float("-inf")


def second(*told) -> dict:
    """A dump whose second token has these entries."""
    return dump(entries=[None, entry(told), LAST])


LINES = [
    (dump((5, 10**30, 7)), "prompt_token_ids.1 is .*less than"),
    (dump((5, 6.5, 7)), "prompt_token_ids.1 is '6.5'"),
    (dump((5, True, 7)), "prompt_token_ids.1 is 'True'"),
    (dump((5, -6, 7)), "prompt_token_ids.1 is '-6'"),
    (dump(entries=[None, entry([(6, -0.5, 1), (10**20, -2, 2)]), LAST]), "100000000000000000000"),
    (dump(entries=[None, entry([(6, -0.5, 1), (-1, -2, 2)]), LAST]), "prompt_logprobs.1.-1"),
    (dump() | {"prompt_token_ids": None}, "prompt_token_ids is 'None'"),
    ({"prompt_logprobs": []}, "no prompt_token_ids; expected prompt_token_ids beside"),
    (dump(entries=[None, {"x": {"logprob": -1, "rank": 1}}, LAST]), r"prompt_logprobs.1.x"),
    (dump(entries=[None, {"6": {"rank": 1}}, LAST]), "no prompt_logprobs.1.6.logprob"),
    (second((6, None, 1)), "prompt_logprobs.1.6.logprob is 'None'"),
    (second((6, "-1", 1)), "prompt_logprobs.1.6.logprob is '-1'"),
    (second((6, NAN, 1)), "a log-probability of nan in row 0"),
    (second((6, -0.5, 1), (8, INFINITE, 2)), "a log-probability of -inf in row 0"),
    (second((6, NAN, 50), (8, -0.5, 1)), "a log-probability of nan in row 0"),
    (second((6, 0.5, 1)), "a log-probability of 0.5 in row 0"),
    (second((6, -0.1, 0)), "rank is '0'"),
    (second((6, -0.1, 1), (8, -3, 3), (9, -4, 4)), "token 1: ranks 1, 3, 4; expected 1, 2"),
    (second((6, -0.1, 1), (8, -3, 2), (9, -3, 2)), "token 1: ranks 1, 2, 2"),
    (second((6, -2, 1), (8, -0.5, 2)), "do not fall with their ranks"),
    (second((7, -0.5, 1)), "token 1: lacks the token that follows, 6"),
    (dump(entries=[None, LAST]), "2 entries for 3 tokens"),
    (dump((5, 6), [None, None], first_row=1), "2 tokens, none of which is predicted"),
    (dump((5, 6), [None, None], first_row=9), "2 tokens, none of which is predicted"),
    (dump((5, 6), [None, None], first_row="x"), "first_row is 'x'"),
    (dump((5,), [None]), "1 tokens, none of which is predicted"),
    (dump((), []), "0 tokens, none of which is predicted"),
    (dump(loss_mask=[True]), "a loss_mask of 1 for 3 tokens"),
    (
        dump(entries=[None, None, LAST], first_row=1, loss_mask=[True] * 3),
        "tokens to be learned before the first answer",
    ),
]


@pytest.mark.parametrize(("line", "message"), LINES)
def test_lines_that_cannot_be_right(line, message, tiny_llama, tmp_path):
    source = tmp_path / "dumps.jsonl"
    source.write_text(json.dumps(dump((8, 10, 11))) + "\n" + json.dumps(line) + "\n")
    refused("prompt_logprobs", source, tmp_path / "c", tiny_llama, f"dumps.jsonl:2.*{message}")


FILES = [
    (gzip.compress(b"x" * 2000, mtime=0)[:-9], "dumps.jsonl.gz", "cannot be read to its end"),
    (gzip.compress(b"{}", mtime=0), "dumps.jsonl", "is not UTF-8"),
    (json.dumps(dump()).encode()[:-9], "dumps.jsonl", "dumps.jsonl:1: is not JSON"),
    (b"[" * 100_000, "dumps.jsonl", "dumps.jsonl:1: is not JSON"),
    (b'{"a": "\xe9"}', "dumps.jsonl", "is not UTF-8"),
    (b"", "dumps.jsonl", "the source holds no rows"),
]


@pytest.mark.parametrize(("data", "name", "message"), FILES)
def test_files_that_cannot_be_read(data, name, message, tiny_llama, tmp_path):
    (tmp_path / name).write_bytes(data)
    refused("prompt_logprobs", tmp_path / name, tmp_path / "c", tiny_llama, message)


def test_compressed_files_lists_and_foreign_line_ends_are_the_same_rows(tiny_llama, tmp_path):
    lines = [json.dumps(one) for one in (dump(), dump((8, 10, 11)))]
    ways = {
        "plain.jsonl": "\n".join(lines).encode(),
        "crlf.jsonl": b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n",
        "list.json": f"[{','.join(lines)}]".encode(),
        "small.jsonl.gz": gzip.compress("\n".join(lines).encode(), mtime=0),
    }
    digests = set()
    for name, data in ways.items():
        (tmp_path / name).write_bytes(data)
        found = taken("prompt_logprobs", tmp_path / name, tmp_path / f"c-{name}", tiny_llama)
        digests.add(found.plan.digest)
    assert len(digests) == 1


def test_a_token_that_ties_with_the_last_of_the_list_is_beside_it(tiny_llama, tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps(second((8, -0.5, 1), (9, -2, 2), (6, -2, 2))))
    record = taken("prompt_logprobs", tmp_path / "d.jsonl", tmp_path / "c", tiny_llama)[0]
    assert record.signals["topk_ids"][0].tolist() == [8, 9]
    assert record.signals["token_logprob"][0] == -2
    assert record.signals["token_rank"][0] == 2


def test_rows_begin_where_the_file_says(tiny_llama, tmp_path):
    line = dump((5, 6, 7, 8), [None, None, LAST, entry([(8, -0.5, 1)])], first_row=1)
    (tmp_path / "d.jsonl").write_text(json.dumps(line))
    record = taken("prompt_logprobs", tmp_path / "d.jsonl", tmp_path / "c", tiny_llama)[0]
    assert record.first_row == 1
    assert record.example.loss_mask.tolist() == [False, False, True, True]


# ---- one text twice, and sources that change ----


def test_a_text_that_is_there_again_is_kept_once(tiny_llama, tmp_path, capsys):
    again = dump()
    again["prompt_logprobs"][1]["6"]["logprob"] = -0.51  # as another batch would have it
    for name, line in {"a": dump(), "b": dump((8, 10, 11)), "c": again}.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line))
    target = tmp_path / "cache"
    named = ["--from", "prompt_logprobs", "--teacher", "t", "--tokenizer", str(tiny_llama)]
    assert run(["cache", "import", str(tmp_path), str(target), *named]) == 0
    assert "1 texts stood there again" in capsys.readouterr().err
    found = TeacherCache.open(target)
    assert len(found) == 2
    assert found[0].signals["topk_logprobs"][0, 0] == -0.5
    assert found.plan.facts["engine"]["texts_given_again"] == 1


def test_two_answers_about_one_text_are_not_chosen_between(tiny_llama, tmp_path):
    other = second((6, -0.9, 1), (9, -1.5, 2))
    other["prompt_logprobs"][2] = dump()["prompt_logprobs"][2]
    (tmp_path / "d.jsonl").write_text(json.dumps(dump()) + "\n" + json.dumps(other))
    message = r"d.jsonl:2: is another answer about the text of .*d.jsonl:1"
    refused("prompt_logprobs", tmp_path / "d.jsonl", tmp_path / "c", tiny_llama, message)


def one_more(rows):
    tokens = rows[1].token_ids.copy()
    tokens[0] = 11
    return [*rows, replace(rows[1], token_ids=tokens)]


@pytest.mark.parametrize("change", [lambda rows: rows[:1], lambda rows: rows[::-1], one_more])
def test_a_source_that_changes_while_it_is_read_is_never_sealed(change, tiny_llama, tmp_path):
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, (dump(), dump((8, 10, 11))))))
    found = source_of("prompt_logprobs", tmp_path / "d.jsonl", str(tiny_llama))
    times = count()

    def changing():
        rows = list(found.read())
        return iter(change(rows) if next(times) else rows)

    with pytest.raises(StillroomError, match="changed while it was read"):
        import_answers(changing, Origin("x", "t", str(tiny_llama)), tmp_path / "c", 4)
    with pytest.raises(StillroomError, match=r"not sealed|no cache here"):
        TeacherCache.open(tmp_path / "c")


# ---- OpenAI's top_logprobs ----


def spoken(tokenizer, *choices) -> str:
    """A response of answers, each a list of (id, log-probability of it)."""

    def token(word, value):
        return {"token": tokenizer.decode([word]), "logprob": value}

    tops = [token(300, -0.5), token(301, -1.5)]
    told = [
        {"logprobs": {"content": [token(*one) | {"top_logprobs": tops} for one in own]}}
        for own in choices
    ]
    return json.dumps({"prompt_token_ids": [5, 6], "choices": told})


def test_every_choice_is_a_text(tiny_llama, tiny_tokenizer, tmp_path):
    (tmp_path / "d.jsonl").write_text(spoken(tiny_tokenizer, [(300, -0.5)], [(301, -1.5)]))
    found = taken("top_logprobs", tmp_path / "d.jsonl", tmp_path / "c", tiny_llama)
    assert [one.example.token_ids.tolist() for one in found] == [[5, 6, 300], [5, 6, 301]]


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ((300, -2.5), r"the token of row 0 has a log-probability of -2.5, and its list says -0.5"),
        ((400, -0.9), r"has a log-probability of -0.9, and its list says at most -1.5"),
        ((400, NAN), "a log-probability of nan in row 0"),
        ((400, None), "logprob is 'None'"),
    ],
)
def test_a_token_and_a_list_of_different_rows(own, message, tiny_llama, tiny_tokenizer, tmp_path):
    (tmp_path / "d.jsonl").write_text(spoken(tiny_tokenizer, [own]))
    refused("top_logprobs", tmp_path / "d.jsonl", tmp_path / "c", tiny_llama, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": "x"}, "choices is 'x'"),
        ({"choices": [{"logprobs": None}]}, "no logprobs.content"),
        ({"choices": [{"logprobs": {"content": [{"token": "a"}]}}]}, r"no choices.0.*logprob"),
        ({"prompt_token_ids": None, "messages": "hi"}, "the template does not write these"),
        ({"prompt_token_ids": None}, "no prompt_token_ids, prompt or messages"),
        ({"prompt_token_ids": []}, "an empty prompt"),
    ],
)
def test_responses_of_another_shape(change, message, tiny_llama, tiny_tokenizer, tmp_path):
    line = json.loads(spoken(tiny_tokenizer, [(300, -0.5)])) | change
    (tmp_path / "d.jsonl").write_text(json.dumps(line))
    refused("top_logprobs", tmp_path / "d.jsonl", tmp_path / "c", tiny_llama, message)


def told(tokenizer, text, *, lose=None, said=None, **more) -> dict:
    """A response whose answer is a text, without one of its tokens, that says `said`."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    own = [(word, -0.5) for number, word in enumerate(ids) if number != lose]

    def token(word, value):
        return {"token": f"token_id:{word}", "logprob": value}

    content = [token(*one) | {"top_logprobs": [token(*one)]} for one in own]
    message = {"role": "assistant", "content": text if said is None else said}
    choice = {"message": message, "logprobs": {"content": content}}
    return {"prompt_token_ids": [5, 6], "choices": [choice]} | more


TEXT = "A short answer, in several words \u2014 and a dash."


@pytest.mark.parametrize("lose", [0, 3, -1])
def test_an_answer_without_one_of_its_tokens(lose, tiny_llama, tiny_tokenizer, tmp_path):
    length = len(tiny_tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    lines = [told(tiny_tokenizer, "Another."), told(tiny_tokenizer, TEXT, lose=lose % length)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    message = rf"d.jsonl:2: the {length - 1} tokens beside message.content do not hold its text"
    refused("top_logprobs", tmp_path / "d.jsonl", tmp_path / "c", tiny_llama, message)


@pytest.mark.parametrize("said", [TEXT, f"  {TEXT}\n", TEXT[10:20], "", None, ["parts"]])
def test_tokens_may_say_more_than_the_text_beside_them(said, tiny_llama, tiny_tokenizer, tmp_path):
    """Thoughts and ends of turns are no part of a message, and servers strip white space."""
    line = told(tiny_tokenizer, TEXT + tiny_tokenizer.eos_token)
    line["choices"][0]["message"]["content"] = said
    (tmp_path / "d.jsonl").write_text(json.dumps(line))
    assert len(taken("top_logprobs", tmp_path / "d.jsonl", tmp_path / "c", tiny_llama)) == 1


def test_a_prompt_beside_tokens_of_another(tiny_llama, tiny_tokenizer, tmp_path):
    ids = tiny_tokenizer(TEXT)["input_ids"]
    for form, line in (
        ("top_logprobs", told(tiny_tokenizer, "Yes.", prompt_token_ids=ids, prompt=TEXT)),
        ("prompt_logprobs", dump(ids, prompt=TEXT)),
    ):
        source = tmp_path / f"{form}.jsonl"
        source.write_text(json.dumps(line))
        assert len(taken(form, source, tmp_path / f"right-{form}", tiny_llama)) == 1
        message = f"the {len(ids)} tokens beside prompt do not hold its text"
        source.write_text(json.dumps(line | {"prompt": TEXT + " More of it."}))
        refused(form, source, tmp_path / f"wrong-{form}", tiny_llama, message)


def test_output_of_the_batch_api(tiny_llama, tiny_tokenizer, tmp_path):
    answer = told(tiny_tokenizer, TEXT)
    del answer["prompt_token_ids"]
    output = {"custom_id": "1", "response": {"status_code": 200, "body": answer}, "error": None}
    messages = [{"role": "user", "content": "a word"}]
    asked = {"custom_id": "1", "method": "POST", "body": {"messages": messages, "logprobs": True}}
    made = {}
    for name, line in {
        "plain": answer | {"messages": messages},
        "beside": output | {"messages": messages},
        "joined": asked | output,
        "both": {"request": asked["body"], "response": answer},
    }.items():
        (tmp_path / "d.jsonl").write_text(json.dumps(line))
        (made[name],) = taken("top_logprobs", tmp_path / "d.jsonl", tmp_path / name, tiny_llama)
    assert len({one.example.example_id for one in made.values()}) == 1
    for line, message in (
        (output, r"no prompt_token_ids, prompt or messages.*lay the request's messages beside"),
        (asked | {"response": {"status_code": 400, "body": {"error": "no"}}}, "no logprobs.conten"),
    ):
        (tmp_path / "d.jsonl").write_text(json.dumps(line))
        refused("top_logprobs", tmp_path / "d.jsonl", tmp_path / "c", tiny_llama, message)


def test_part_of_a_character_is_no_word(tiny_llama, tiny_tokenizer, tmp_path):
    line = json.loads(spoken(tiny_tokenizer, [(300, -0.5)]))
    top = line["choices"][0]["logprobs"]["content"][0]["top_logprobs"][1]
    top["bytes"] = [0xE2, 0x80]
    (tmp_path / "d.jsonl").write_text(json.dumps(line))
    refused("top_logprobs", tmp_path / "d.jsonl", tmp_path / "c", tiny_llama, "none of the")


# ---- DistillKit ----

RAW = {
    "input_ids": [[5, 6, 7]],
    "token_ids": [[[6, 2], [7, 4]]],
    "top_values": [[[-1.0, -2.0], [-1.0, -2.0]]],
}
PACKED = {
    "input_ids": [[5, 6, 7]],
    "compressed_logprobs": [[[0] * 8] * 2],
    "bytepacked_indices": [[[0, 64, 0]] * 2],
}
SETTINGS = {"d": 768, "k": 2, "exact_k": 2, "exact_dtype": "float32", "delta_encoding": False}
BIN = {"scale_dtype": "float16", "element_bits": 8, "num_elements": 1}
NULL = pa.array([None], pa.list_(pa.int64()))
TABLES = [
    (RAW | {"input_ids": NULL}, None, "input_ids is 'None'"),
    (RAW | {"input_ids": [[5.0, 6.5, 7.0]]}, None, "input_ids holds 5.0"),
    (RAW | {"input_ids": [["a", "b", "c"]]}, None, "input_ids holds 'a'"),
    (
        RAW | {"input_ids": pa.array([[5, 2**63 + 5, 7]], pa.list_(pa.uint64()))},
        None,
        "input_ids holds 9223372036854775813; expected whole numbers of 31 bits",
    ),
    ({"token_ids": RAW["token_ids"]}, None, "no input_ids"),
    (RAW | {"token_ids": pa.array([[None, [7, 4]]])}, None, "rows of different sizes"),
    (RAW | {"token_ids": [[[6, -2], [7, 4]]]}, None, "ids of answers hold -2"),
    (RAW | {"token_ids": [[[6, 2], [7]]]}, None, "token_ids has rows of different sizes"),
    (RAW | {"top_values": pa.array([[[-1.0, None], [-1.0, -2.0]]])}, None, "top_values holds None"),
    (RAW | {"top_values": [[[-1.0, -2.0]]]}, None, r"ids \(2, 2\) and log-probabilities \(1, 2\)"),
    (
        {"input_ids": [[5, 6]], "attention_mask": [[1]]} | {k: RAW[k] for k in list(RAW)[1:]},
        None,
        "1 in attention_mask for 2 tokens",
    ),
    (
        {
            "input_ids": [[5, 6, 7]],
            "attention_mask": [[1, 2, 1]],
            "token_ids": [[[6, 2]] * 3],
            "top_values": [[[-1.0, -2.0]] * 3],
        },
        None,
        "document 1: stands in two places of attention_mask",
    ),
    (PACKED, "a: [1", "is no YAML"),
    (PACKED, "", "compression_config.yaml: .*expected a table"),
    (PACKED, SETTINGS | {"exact_k": 5}, "exact_k = 5 and 0 in bins, of k = 2"),
    (PACKED, SETTINGS | {"exact_k": 1, "residual_bins": [BIN, BIN]}, "2 in bins, of k = 2"),
    (PACKED, SETTINGS | {"d": 1}, "'d': Input should be greater than 1"),
    (PACKED | {"compressed_logprobs": [[[0] * 7] * 2]}, SETTINGS, "7 bytes of .*expected 8 by"),
    (
        PACKED | {"compressed_logprobs": [[[0] * 5] * 2]},
        SETTINGS | {"exact_k": 1, "residual_bins": [BIN]},
        "5 bytes of .*expected 7 by",
    ),
    (PACKED | {"compressed_logprobs": [[[300] * 8] * 2]}, SETTINGS, "holds 300; expected bytes"),
    (PACKED | {"compressed_logprobs": [[[0] * 8]]}, SETTINGS, r"ids \(2, 2\) and .* \(1, 2\)"),
]


@pytest.mark.parametrize(("table", "settings", "message"), TABLES)
def test_tables_that_cannot_be_right(table, settings, message, tiny_llama, tmp_path):
    source = tmp_path / "theirs"
    source.mkdir()
    pq.write_table(pa.table(table), source / "data_0.parquet")
    if settings is not None:
        told = settings if isinstance(settings, str) else yaml.safe_dump(settings)
        (source / "compression_config.yaml").write_text(told)
    refused("distillkit", source, tmp_path / "c", tiny_llama, message)


@pytest.mark.parametrize(("whole", "message"), [(True, "as many, as"), (False, "one less, as")])
def test_a_missing_row_is_not_the_other_length(whole, message, tiny_llama, tmp_path):
    """Of L tokens both L and L - 1 rows are DistillKit's, each in files of its own."""
    tokens = [5, 6, 7, 8]
    rows = [[1, 2]] * (len(tokens) if whole else len(tokens) - 1)
    other = rows[:-1] if whole else [*rows, [1, 2]]
    lists = [rows, rows, other]
    columns = {"input_ids": [[9, *tokens[1:]], tokens, tokens[::-1]], "token_ids": lists}
    values = [[[-0.5, -1.5] for _ in text] for text in lists]
    pq.write_table(pa.table(columns | {"top_values": values}), tmp_path / "data_0.parquet")
    refused("distillkit", tmp_path, tmp_path / "c", tiny_llama, f"row 3.*{message}.*row 1 has")


def test_damaged_parquet(tiny_llama, tmp_path):
    pq.write_table(pa.table(RAW), tmp_path / "data_0.parquet")
    whole = (tmp_path / "data_0.parquet").read_bytes()
    (tmp_path / "data_0.parquet").write_bytes(whole[:-100])
    refused("distillkit", tmp_path, tmp_path / "c", tiny_llama, "data_0.parquet: is not Parquet")
    refused("distillkit", tmp_path / "no", tmp_path / "c", tiny_llama, "no such file or directory")


def test_columns_of_the_softmax_are_the_formats_own(tmp_path):
    (tmp_path / "compression_config.yaml").write_text(yaml.safe_dump(SETTINGS))
    found = source_of("distillkit", tmp_path, "")
    assert [columns_of(found, told) for told in (0, 768)] == [768, 768]
    with pytest.raises(StillroomError, match="1000 columns, and the files were written for 768"):
        columns_of(found, 1000)
    with pytest.raises(StillroomError, match=r"no such file.*--config"):
        source_of("distillkit", tmp_path, "", str(tmp_path / "typo.yaml"))
    with pytest.raises(StillroomError, match=r"--config with --from prompt_logprobs"):
        source_of("prompt_logprobs", tmp_path, "", "some.yaml")


# ---- lists about other tokens ----


def shifted(directory, by: int):
    """Texts of random tokens and a teacher that is rather sure of the token `by` places off."""
    random = np.random.default_rng(0)
    table = {"input_ids": [], "token_ids": [], "top_values": []}
    for _ in range(8):
        tokens = random.integers(4, 700, 24)
        about = np.roll(tokens, -1 - by)[:23]
        table["input_ids"].append(tokens)
        table["token_ids"].append([[one, 701, 702] for one in about])
        table["top_values"].append([[-0.7, -2.0, -3.0]] * 23)
    directory.mkdir()
    pq.write_table(pa.table(table), directory / "d.parquet")
    return directory


def test_a_teacher_who_does_not_tell_where_its_lists_belong_is_said_to(
    tiny_llama, tmp_path, capsys
):
    """Lists far from every token of the text could stand anywhere; those of a teacher could not."""
    for by in (0, 7):
        asked = ["cache", "import", str(shifted(tmp_path / f"s{by}", by)), str(tmp_path / f"c{by}")]
        about = ["--from", "distillkit", "--teacher", "t", "--tokenizer", str(tiny_llama)]
        assert run([*asked, *about]) == 0
        told = capsys.readouterr().err
        assert ("nothing shows that the lists are about" in told) is (by == 7)


@pytest.mark.parametrize(
    ("by", "message"), [(-1, "1 before them"), (1, "1 after them"), (2, "2 after them")]
)
def test_lists_that_were_laid_some_places_off(by, message, tiny_llama, tmp_path):
    source = shifted(tmp_path / "theirs", by)
    refused("distillkit", source, tmp_path / "c", tiny_llama, f"{message}.*row t about token t")


def test_lists_about_their_own_tokens_are_taken(tiny_llama, tmp_path):
    assert len(taken("distillkit", shifted(tmp_path / "t", 0), tmp_path / "c", tiny_llama)) == 8


# ---- out ----


@pytest.fixture(scope="module")
def many(tiny_llama, tmp_path_factory):
    made = memory_cache.captured(tiny_llama, memory_cache.examples(130), k=4, tail_draws=0)
    return TeacherCache.open(made.write(tmp_path_factory.mktemp("many") / "cache"))


def test_an_export_that_fails_leaves_nothing_and_takes_nothing_of_others(many, tmp_path):
    (tmp_path / "out.part").mkdir()

    def full(done, _all):
        if done == 70:
            raise OSError(28, "No space left on device")

    for form in ("parquet", "jsonl", "safetensors"):
        with pytest.raises(OSError, match="No space"):
            export(many, tmp_path / "out", form, full)
    assert [one.name for one in tmp_path.iterdir()] == ["out.part"]


def test_parquet_is_written_a_row_group_at_a_time(many, tmp_path):
    export(many, tmp_path / "out", "parquet")
    file = pq.ParquetFile(tmp_path / "out" / "data_0.parquet")
    groups = [file.metadata.row_group(n).num_rows for n in range(file.metadata.num_row_groups)]
    assert groups == [64, 64, 2]
    found = file.read().column("example_id").to_pylist()
    assert found == [record.example.example_id for record in many]


def test_urls_and_paths_through_files(many, tmp_path, capsys):
    where = str(many.storage.location)
    (tmp_path / "file").write_text("")
    for target, message in {
        "s3://bucket/x": "s3://bucket/x: is a URL",
        str(tmp_path / "file" / "x"): "Not a directory",
    }.items():
        assert run(["cache", "export", where, target, "--to", "parquet"]) == 2
        assert message in capsys.readouterr().err


def test_draws_alone_are_no_list(tiny_llama, tmp_path):
    made = memory_cache.captured(tiny_llama, memory_cache.examples(3), k=0, tail_draws=16)
    draws = TeacherCache.open(made.write(tmp_path / "cache"))
    for form in ("jsonl", "distillkit"):
        with pytest.raises(StillroomError, match=r"lacks exact ids.*parquet"):
            export(draws, tmp_path / form, form)
    export(draws, tmp_path / "parquet", "parquet")
    row = pq.read_table(tmp_path / "parquet").to_pylist()[1]
    for name in ("draw_ids", "draw_counts"):
        np.testing.assert_array_equal(row[name], draws[1].signals[name])
