"""Rows that cannot be used, conversations that are too long, and what is there twice."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.config import Prepare, Source
from stillroom.pipeline.corpus.preparing import prepare

REFUSES_SYSTEMS = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no systems here') }}"
    "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


GOOD = {"messages": [user("Who?"), said("Me.")]}


@pytest.fixture
def prepared(tiny_llama, tmp_path):
    def make(*rows, name="rows.jsonl", source=None, **settings):
        path = tmp_path / name
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        if rows:
            path.write_bytes(b"\n".join(lines) + b"\n")
        template = tmp_path / "template.jinja"
        template.write_text(REFUSES_SYSTEMS)
        table = Source(name="s", path=str(path), **(source or {}))
        more = {"heldout": 0.0, "window": 128, "chat_template": str(template)} | settings
        return prepare(Prepare(source=(table,), **more), str(tiny_llama), tmp_path / "corpus")

    return make


BAD = {
    "not JSON": (b'{"messages": [', "is not JSON", '{"messages": ['),
    "bad UTF-8": (b'{"messages": "\xff"}', "byte 0xff at byte offset 107 is not UTF-8", "�"),
    "half a character": (b'{"messages": "\\ud83d"}', r"half of a character (\ud83d)", ""),
    "half a character in JSON text": (
        {"messages": json.dumps([user("a"), said("\ud83d")])},
        r"half of a character (\ud83d)",
        "",
    ),
    "no messages": ({"messages": "hello"}, "are text that is not JSON", "hello"),
    "no column": ({"massages": []}, "no column 'messages'", ""),
    "template": (
        {"messages": [{"role": "system", "content": "S."}, *GOOD["messages"]]},
        "no systems here",
        "system",
    ),
    "empty": ({"messages": []}, "document is empty", ""),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_stops_or_is_written_down(name, prepared, tmp_path):
    row, reason, begins = BAD[name]
    with pytest.raises(CorpusError) as refused:
        prepared(GOOD, row)
    assert f"{tmp_path / 'rows.jsonl'}:2: " in str(refused.value)
    assert reason in str(refused.value)
    corpus = prepared(GOOD, row, on_error="skip")
    assert corpus.facts["dropped"] == {"rejected_rows": 1}
    (told,) = map(json.loads, (corpus.directory / "rejects.jsonl").read_text().splitlines())
    assert told["row"] == f"{tmp_path / 'rows.jsonl'}:2"
    assert reason in told["reason"]
    assert begins in told["begins"]
    assert len(corpus.split("train")) == 1


def test_up_to_ten_bad_rows_are_named_at_once(prepared):
    bad = [row for row, *_ in BAD.values()]
    with pytest.raises(CorpusError, match="8 rows cannot be used") as refused:
        prepared(GOOD, *bad)
    assert [f"rows.jsonl:{line}:" in str(refused.value) for line in range(2, 10)] == [True] * 8
    with pytest.raises(CorpusError, match="10 rows or more cannot be used") as refused:
        prepared(GOOD, *bad * 2)
    assert str(refused.value).count("rows.jsonl:") == 10
    assert 'on_error = "skip"' in str(refused.value)


def test_a_list_that_breaks_off_costs_its_rest(prepared):
    rows = json.dumps([GOOD, GOOD | {"n": 1}], indent=1)
    with pytest.raises(CorpusError, match=r"rows\.json:\d+: is not JSON"):
        prepared(rows[:-20].encode(), name="rows.json")
    corpus = prepared(rows[:-20].encode(), name="rows.json", on_error="skip")
    assert corpus.facts["dropped"]["rejected_rows"] == 1


def test_a_damaged_page_costs_its_row_group(prepared, tmp_path):
    path = tmp_path / "rows.parquet"
    texts = [f"row {n} has these words in it" for n in range(300)]
    pq.write_table(
        pa.table({"text": texts}),
        path,
        row_group_size=100,
        use_dictionary=False,
        compression="gzip",
    )
    facts = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    for at in range(facts.data_page_offset + 60, facts.data_page_offset + 90):
        data[at] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(CorpusError, match=r"rows\.parquet rows 101 to 200: a page cannot be read"):
        prepared(name="rows.parquet")
    corpus = prepared(name="rows.parquet", on_error="skip")
    assert corpus.facts["counts"]["train"]["documents"] == 200
    path.write_bytes(data[:-9])
    with pytest.raises(CorpusError, match=r"rows\.parquet: is not Parquet"):
        prepared(name="rows.parquet")


def test_text_that_is_not_utf8_costs_its_row(prepared, tmp_path):
    raw = pa.array([b"good words here", b"bad \xff", b"more good words"]).cast(pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"text": text}), tmp_path / "rows.parquet")
    with pytest.raises(CorpusError, match=r"rows\.parquet row 2: holds text that is not UTF-8"):
        prepared(name="rows.parquet")
    assert len(prepared(name="rows.parquet", on_error="skip").split("train")) == 2


WORDS = ["alpha", "beta", "gamma", "delta", "kappa", "sigma", "omega", "theta"]


def turns(count, length=40):
    """A conversation of which every turn can be told from its words."""
    return [
        message
        for number, word in enumerate(WORDS[:count])
        for message in (user(f"{word} {number}?"), said(f"{word} " * length))
    ]


def texts(corpus, tokenizer):
    return [tokenizer.decode(example.token_ids) for example in corpus.split("train")]


def test_long_conversations_are_cut_between_turns(prepared, tiny_tokenizer):
    system = [{"role": "system", "content": "Be brief."}]
    row = {"messages": system + turns(6)}
    corpus = prepared(row, chat_template="", window=256)
    made = texts(corpus, tiny_tokenizer)
    assert len(made) > 1
    assert corpus.facts["dropped"] == {"conversations_cut_into_pieces": 1}
    start = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    assert all(text.startswith(start) for text in made)
    assert all(text.endswith("<|im_end|>\n") for text in made)
    answers = [said for text in made for said in text.split("assistant\n")[1:]]
    assert [one.split()[0] for one in answers] == WORDS[:6]
    assert corpus.facts["counts"]["train"]["documents"] == 1
    assert corpus.facts["chats"]["answers"] == 6


@pytest.mark.parametrize("long", ["cut", "keep_end", "skip"])
def test_a_conversation_of_many_turns_is_not_made_to_be_measured(long, prepared, monkeypatch):
    """Every turn is rendered with its history: making all of it would take its length squared."""
    from stillroom.pipeline.corpus.chat import ChatTokenizer

    made, make = [], ChatTokenizer.__call__
    monkeypatch.setattr(
        ChatTokenizer,
        "__call__",
        lambda self, document: made.append(len(document.messages)) or make(self, document),
    )
    row = {"messages": [m for n in range(200) for m in (user(f"ask {n}"), said(f"say {n}"))]}
    corpus = prepared(row, GOOD, window=256, long=long)
    assert max(made) < 64
    pieces = len(corpus.split("train")) - 1
    assert {"cut": pieces > 10, "keep_end": pieces == 1, "skip": pieces == 0}[long]


def test_what_a_killed_process_left_is_removed_and_what_others_work_in_stays(prepared, tmp_path):
    from stillroom.pipeline.corpus.scratch import scratch_beside

    left = tmp_path / ".corpus-abandoned"
    left.mkdir()
    (left / "lock").touch()
    (tmp_path / ".corpus-unknown").mkdir()
    with scratch_beside(tmp_path / "corpus") as others:
        prepared(GOOD)
        assert others.is_dir()
    assert not left.exists()
    assert (tmp_path / ".corpus-unknown").is_dir()


def test_another_end_of_text_makes_a_corpus_anew(tiny_llama, prepared, tmp_path):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    source = Source(name="s", path=str(tmp_path / "rows.jsonl"))
    (tmp_path / "rows.jsonl").write_text(json.dumps(GOOD))
    config = Prepare(source=(source,), heldout=0.0, window=128)
    first = prepare(config, str(model), tmp_path / "corpus")
    (model / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    second = prepare(config, str(model), tmp_path / "corpus")
    assert [first.facts["stop_ids"], second.facts["stop_ids"]] == [[2], [0, 2]]


def test_the_end_of_long_conversations_may_be_kept(prepared, tiny_tokenizer):
    row = {"messages": [{"role": "system", "content": "Be brief."}, *turns(6)]}
    corpus = prepared(row, chat_template="", window=256, long="keep_end")
    (text,) = texts(corpus, tiny_tokenizer)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert "sigma" in text
    assert "alpha" not in text
    left = text.count("<|im_start|>") - 1
    dropped = corpus.facts["dropped"]
    assert dropped == {"conversations_without_their_beginning": 1, "messages_cut": 12 - left}


def test_long_conversations_may_be_skipped(prepared):
    corpus = prepared({"messages": turns(6)}, GOOD, chat_template="", window=256, long="skip")
    assert corpus.facts["dropped"] == {"conversations_longer_than_the_window": 1}
    assert len(corpus.split("train")) == 1


def test_one_exchange_that_is_too_long_loses_its_end(prepared, tiny_tokenizer):
    corpus = prepared({"messages": turns(2, 300)}, GOOD, chat_template="", window=256)
    made = texts(corpus, tiny_tokenizer)
    assert [text.startswith("<|im_start|>user\n") for text in made] == [True] * 3
    assert corpus.facts["dropped"]["tokens_cut"] > 256
    with_end = prepared(
        {"messages": turns(1, 300)}, GOOD, chat_template="", window=256, long="keep_end"
    )
    name = "conversations_whose_last_turn_is_longer_than_the_window"
    assert with_end.facts["dropped"] == {name: 1}


def test_what_is_there_twice_is_counted_and_may_weigh_double(prepared):
    other = {"messages": [user("You?"), said("Yes.")]}
    rows = (GOOD, other, GOOD, GOOD)
    corpus = prepared(*rows)
    assert corpus.facts["repeats"] == {"documents": 2}
    assert [example.weight for example in corpus.split("train")] == [1.0, 1.0]
    kept = prepared(*rows, duplicates="keep")
    assert [example.weight for example in kept.split("train")] == [3.0, 1.0]
    assert kept.digest != corpus.digest


def test_settings_of_conversations_make_a_corpus_anew(prepared, tmp_path):
    thinks = REFUSES_SYSTEMS.replace("m['content']", "(m['content'] if loop.last else '')")
    first = prepared({"messages": turns(2, 3)}, turns="each")
    inode = (first.directory / "corpus.json").stat().st_ino
    prepared({"messages": turns(2, 3)}, turns="each")
    assert (first.directory / "corpus.json").stat().st_ino == inode
    assert prepared({"messages": turns(2, 3)}, turns="last").digest != first.digest
    own = tmp_path / "own.jinja"
    own.write_text(REFUSES_SYSTEMS)
    same = prepared({"messages": turns(2, 3)}, turns="each", chat_template=str(own))
    assert same.digest == first.digest
    own.write_text(thinks)
    with pytest.raises(CorpusError, match="does not show"):
        prepared({"messages": turns(2, 3)}, turns="each", chat_template=str(own))
    own.write_text(REFUSES_SYSTEMS.replace("user", "human"))
    prepared({"messages": turns(2, 3)}, turns="each", chat_template=str(own))


def test_a_corpus_of_an_older_rule_is_made_anew_and_stays_readable(prepared):
    from stillroom.pipeline.corpus.files import Corpus

    corpus = prepared(GOOD)
    facts = json.loads((corpus.directory / "corpus.json").read_text())
    del facts["rule"]
    (corpus.directory / "corpus.json").write_text(json.dumps(facts))
    assert len(Corpus.open(corpus.directory).split("train")) == 1
    assert "rule" in prepared(GOOD).facts
