"""Preparing a corpus: windows, splits, digests, and what is refused."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.cache_schemas.errors import ConfigError, CorpusError, PlanMismatch, StillroomError
from stillroom.pipeline.config import Prepare, Source
from stillroom.pipeline.corpus.preparing import (
    Corpus,
    heldout_documents,
    prepare,
    tokenizer_facts,
    windows,
)
from stillroom.pipeline.record import content_id
from tests import tiny_models

TOPICS = Source(name="topics", kind="pydoc_topics")


def text_source(path, **more) -> Source:
    return Source(name="texts", kind="text", path=str(path), **more)


def settings(*sources, **more) -> Prepare:
    return Prepare(**({"source": sources or (TOPICS,), "window": 64} | more))


@pytest.fixture(scope="module")
def topics(tiny_llama, tmp_path_factory):
    """The demo's corpus with a tiny tokenizer."""
    return prepare(settings(), str(tiny_llama), tmp_path_factory.mktemp("corpus") / "corpus")


@given(
    length=st.integers(1, 200), size=st.integers(2, 50), overlap=st.integers(0, 49), data=st.data()
)
def test_overlapping_windows_predict_every_token_once(length, size, overlap, data):
    overlap = min(overlap, size - 1)
    tokens = np.arange(length, dtype=np.int32)
    spoken = np.array(data.draw(st.lists(st.booleans(), min_size=length, max_size=length)))
    cut = list(windows((tokens, spoken), size, overlap))
    assert max(len(ids) for ids, _ in cut) <= size
    predicted = [i for ids, mask in cut for i in ids[1:][mask[1:]]]
    first = {int(ids[0]) for ids, _ in cut} if overlap == 0 else {0}
    assert predicted == [i for i in range(length) if spoken[i] and i not in first]


def test_windows_without_overlap_join_to_the_document():
    tokens = np.arange(130, dtype=np.int32)
    cut = [ids for ids, _ in windows((tokens, np.ones(130, bool)), 64, 0)]
    assert [len(ids) for ids in cut] == [64, 64, 2]
    assert np.array_equal(np.concatenate(cut), tokens)


def test_examples_are_read_back_as_they_were_made(topics, tiny_tokenizer):
    examples = list(topics.split("train"))
    assert len(examples) == topics.facts["counts"]["train"]["examples"] > 100
    for example in examples[:20]:
        assert example.token_ids.dtype == np.int32
        assert example.loss_mask.dtype == bool
        assert example.example_id == content_id(example.token_ids, example.loss_mask)
        assert example.source == "topics"
    text = tiny_tokenizer.decode(np.concatenate([e.token_ids for e in examples[:3]]))
    assert text[:60] in tiny_models.english()


def test_a_split_can_be_sliced_lazily(topics):
    train = topics.split("train")
    assert [e.example_id for e in train[3:9][1:4]] == [train[i].example_id for i in (4, 5, 6)]
    assert train[-1].example_id == list(train)[-1].example_id
    with pytest.raises(IndexError):
        train[len(train)]


def test_no_document_is_in_both_splits(topics):
    documents = {n: {e.document_id for e in topics.split(n)} for n in ("train", "heldout")}
    assert documents["train"] & documents["heldout"] == set()
    for name, found in documents.items():
        assert len(found) == topics.facts["counts"][name]["documents"] > 0


def test_no_example_is_there_twice(topics):
    ids = [e.example_id for name in ("train", "heldout") for e in topics.split(name)]
    assert len(set(ids)) == len(ids)


@given(st.sets(st.text(min_size=1), min_size=2), st.floats(0.01, 0.99), st.integers(0, 5))
def test_a_split_holds_out_the_share_it_should(documents, share, seed):
    held = heldout_documents(documents, share, seed)
    assert held < documents
    assert len(held) == min(max(1, round(share * len(documents))), len(documents) - 1)
    assert heldout_documents(sorted(documents, reverse=True), share, seed) == held


def test_the_same_settings_give_the_same_bytes(topics, tiny_llama, tmp_path):
    again = prepare(settings(), str(tiny_llama), tmp_path / "again")
    for name in ("corpus.json", "train.arrow", "heldout.arrow"):
        assert (again.directory / name).read_bytes() == (topics.directory / name).read_bytes()


def test_a_second_preparation_reuses_the_first(tiny_llama, tmp_path):
    first = prepare(settings(), str(tiny_llama), tmp_path / "corpus")
    before = (first.directory / "train.arrow").stat().st_ino
    prepare(settings(), str(tiny_llama), tmp_path / "corpus")
    assert (first.directory / "train.arrow").stat().st_ino == before
    changed = prepare(settings(window=32), str(tiny_llama), tmp_path / "corpus")
    assert changed.digest != first.digest
    assert max(len(e.token_ids) for e in changed.split("train")) == 32
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus"]


@pytest.mark.parametrize(
    "change", [{"window": 63}, {"seed": 1}, {"heldout": 0.2}, {"overlap": 8}, {"min_tokens": 60}]
)
def test_every_setting_that_changes_the_examples_changes_the_digest(
    change, topics, tiny_llama, tmp_path
):
    assert prepare(settings(**change), str(tiny_llama), tmp_path / "c").digest != topics.digest


def test_where_the_files_are_does_not_change_the_digest(tiny_llama, tmp_path, english):
    digests = set()
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for number in range(4):
            (tmp_path / folder / f"{number}.txt").write_text(english[number * 900 :][:900])
        source = text_source(tmp_path / folder)
        made = prepare(settings(source), str(tiny_llama), tmp_path / folder / "corpus")
        digests.add(made.digest)
    assert len(digests) == 1


def test_the_file_kinds_agree(tiny_llama, tmp_path, english):
    texts = [english[i * 700 :][:700] for i in range(5)]
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    lines = [json.dumps({"body": text, "n": 1}) for text in texts]
    (tmp_path / "x.jsonl").write_text("\n\n".join(lines) + "\n")
    pq.write_table(pa.table({"n": [1] * 5, "body": texts}), tmp_path / "x.parquet")
    sources = (
        text_source(tmp_path / "texts"),
        Source(name="texts", kind="jsonl", path=str(tmp_path / "x.jsonl"), text_column="body"),
        Source(name="texts", kind="parquet", path=str(tmp_path / "*.parquet"), text_column="body"),
    )
    made = [
        prepare(settings(source), str(tiny_llama), tmp_path / f"{source.kind}-corpus")
        for source in sources
    ]
    assert len({corpus.digest for corpus in made}) == 1


def test_a_limit_keeps_the_first_documents(tiny_llama, tmp_path):
    limited = TOPICS.model_copy(update={"limit": 4})
    made = prepare(settings(limited, heldout=0.25), str(tiny_llama), tmp_path / "c")
    counts = made.facts["counts"]
    assert (counts["train"]["documents"], counts["heldout"]["documents"]) == (3, 1)


def test_what_is_left_out_is_counted(tiny_llama, tmp_path, english):
    rows = [english[:500], "", "a", english[:500], english[500:900]]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({"text": row}) for row in rows))
    source = Source(name="x", kind="jsonl", path=str(path))
    config = settings(source, empty_documents="skip", window=512)
    made = prepare(config, str(tiny_llama), tmp_path / "c")
    dropped = {"empty_documents": 1, "short_windows": 1, "duplicate_windows": 1}
    assert made.facts["dropped"] == dropped


def test_tokenizer_facts_survive_saving_again(tiny_llama, tiny_tokenizer, tmp_path):
    tiny_tokenizer(["some text"], padding=True, truncation=True, max_length=4)
    tiny_tokenizer.save_pretrained(tmp_path / "again")
    assert tokenizer_facts(str(tmp_path / "again")) == tokenizer_facts(str(tiny_llama))
    assert tokenizer_facts(str(tiny_llama))["vocab_size"] == 768


def test_a_corpus_that_is_not_there_or_not_whole_is_refused(topics, tmp_path):
    with pytest.raises(CorpusError, match="stillroom prepare"):
        Corpus.open(tmp_path)
    (tmp_path / "corpus.json").write_text((topics.directory / "corpus.json").read_text())
    (tmp_path / "train.arrow").write_bytes((topics.directory / "train.arrow").read_bytes()[:-100])
    with pytest.raises(CorpusError, match=r"train\.arrow: is damaged"):
        Corpus.open(tmp_path).split("train")
    (tmp_path / "corpus.json").write_text('{"format_version": 99}')
    with pytest.raises(CorpusError, match="format version 99"):
        Corpus.open(tmp_path)


def refused(files: dict[str, bytes], source: dict, tmp_path, **more) -> dict:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    path = str(tmp_path / source.pop("path", ""))
    return {"source": Source(**({"name": "s", "path": path} | source)), "settings": more}


BAD_SOURCES = {
    "no files": ({}, {"kind": "text", "path": "none*.txt"}, "no such file"),
    "empty directory": ({}, {"kind": "text"}, "expected a file, a glob, or a directory"),
    "empty corpus": ({"a.jsonl": b"\n\n"}, {"kind": "jsonl", "path": "a.jsonl"}, "no example came"),
    "empty document": (
        {"a.jsonl": b'{"text": "x y z"}\n{"text": ""}\n'},
        {"kind": "jsonl", "path": "a.jsonl"},
        r"a\.jsonl:2: document is empty",
    ),
    "one token": ({"a.txt": b"e"}, {"kind": "text", "path": "a.txt"}, "1 short windows"),
    "one document": (
        {"a.txt": b"hello there, this is a document"},
        {"kind": "text", "path": "a.txt"},
        "set heldout = 0",
    ),
    "unknown column": (
        {"a.jsonl": b'{"txt": "x", "id": 3}\n'},
        {"kind": "jsonl", "path": "a.jsonl"},
        "Did you mean 'txt'",
    ),
    "bad utf-8 in text": (
        {"a.txt": b"good\nbad \xff here"},
        {"kind": "text", "path": "a.txt"},
        r"a\.txt:2: byte 0xff at byte offset 9 is not UTF-8",
    ),
    "bad utf-8 in jsonl": (
        {"a.jsonl": b'{"text": "x y"}\n{"text": "\xe9"}\n'},
        {"kind": "jsonl", "path": "a.jsonl"},
        r"a\.jsonl:2: byte 0xe9 at byte offset 26 is not UTF-8",
    ),
    "not json": (
        {"a.jsonl": b'{"text": "x y"}\n{"text": \n'},
        {"kind": "jsonl", "path": "a.jsonl"},
        r"a\.jsonl:2: is not JSON",
    ),
    "json deeper than the stack": (
        {"a.jsonl": b"[" * 200_000},
        {"kind": "jsonl", "path": "a.jsonl"},
        r"a\.jsonl:1: is not JSON",
    ),
    "a list on a line": (
        {"a.jsonl": b"[1, 2]\n"},
        {"kind": "jsonl", "path": "a.jsonl"},
        "one JSON object on each line",
    ),
    "text that is a number": (
        {"a.jsonl": b'{"text": 3}\n'},
        {"kind": "jsonl", "path": "a.jsonl"},
        "column 'text' holds int",
    ),
    "not parquet": (
        {"a.parquet": b"no"},
        {"kind": "parquet", "path": "a.parquet"},
        "is not Parquet",
    ),
    "not messages": (
        {"a.jsonl": b'{"chat": ["hi"]}\n'},
        {"kind": "jsonl", "path": "a.jsonl", "messages_column": "chat"},
        "is not a list of chat messages",
    ),
}


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_bad_sources_are_refused_and_leave_nothing(name, tiny_llama, tmp_path):
    files, source, message = BAD_SOURCES[name]
    given = refused(files, dict(source), tmp_path)
    target = tmp_path / "out" / "corpus"
    with pytest.raises(CorpusError, match=message):
        prepare(settings(given["source"]), str(tiny_llama), target)
    assert not target.parent.exists() or list(target.parent.iterdir()) == []


def test_a_window_longer_than_the_context_is_refused(tiny_llama, tmp_path):
    with pytest.raises(ConfigError, match=r"window = 513 is longer .* context of 512"):
        prepare(settings(window=513), str(tiny_llama), tmp_path / "c")
    with pytest.raises(ConfigError, match="overlap < window"):
        prepare(settings(overlap=64), str(tiny_llama), tmp_path / "c")


def test_another_tokenizer_than_the_teachers_is_refused(tiny_llama, tmp_path):
    tiny_models.save_tokenizer(tmp_path / "other", vocab_size=600)
    config = settings(tokenizer=str(tmp_path / "other"))
    with pytest.raises(PlanMismatch, match="expected the teacher's"):
        prepare(config, str(tiny_llama), tmp_path / "c")
    assert prepare(config, "", tmp_path / "c").facts["tokenizer"]["vocab_size"] == 600


def test_a_tokenizer_too_big_for_the_teacher_is_refused(tmp_path):
    small = tiny_models.save_llama(tmp_path / "small", vocab_size=300)
    tiny_models.save_tokenizer(small, vocab_size=768)
    with pytest.raises(CorpusError, match="expected ids below 300"):
        prepare(settings(), str(small), tmp_path / "c")


def test_a_missing_model_or_tokenizer_is_named(tiny_llama, tmp_path):
    with pytest.raises(StillroomError, match="nowhere"):
        prepare(settings(), str(tmp_path / "nowhere"), tmp_path / "c")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((tiny_llama / "config.json").read_text())
    with pytest.raises(CorpusError, match="no tokenizer can be loaded"):
        prepare(settings(), str(tmp_path / "bare"), tmp_path / "c")


@given(
    length=st.integers(1, 200), size=st.integers(4, 50), overlap=st.integers(0, 49), data=st.data()
)
def test_every_window_begins_as_a_text_does(length, size, overlap, data):
    begin = data.draw(st.integers(1, 2))
    overlap = min(overlap, size - begin - 1)
    tokens = np.arange(length + begin, dtype=np.int32)
    spoken = np.array(
        data.draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
    )
    cut = list(windows((tokens, spoken), size, overlap, begin))
    assert max(len(ids) for ids, _ in cut) <= size
    assert all(ids[:begin].tolist() == tokens[:begin].tolist() for ids, _ in cut)
    predicted = [i for ids, mask in cut for i in ids[1:][mask[1:]]]
    lost = {int(ids[begin]) for ids, _ in cut[1:]} if overlap == 0 else set()
    assert predicted == [i for i in range(1, len(tokens)) if spoken[i] and i not in lost]
    assert set(np.concatenate([ids for ids, _ in cut])) == set(tokens.tolist())


@pytest.fixture(scope="module")
def begins(tiny_llama, tmp_path_factory):
    """The tiny teacher with a tokenizer that puts BOS before a text, as Gemma's and Llama's do."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    directory = shutil.copytree(tiny_llama, tmp_path_factory.mktemp("begins") / "model")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save_pretrained(directory)
    return directory


def texts_of(corpus) -> dict[str, list]:
    made: dict[str, list] = {}
    for example in corpus.split("train"):
        made.setdefault(example.document_id, []).append(example)
    return made


@pytest.mark.parametrize("overlap", [0, 8])
def test_bos_stands_before_every_window(begins, tiny_llama, tmp_path, overlap):
    some = Source(name="topics", kind="pydoc_topics", limit=4)
    plain, begun = (
        prepare(settings(some, heldout=0, overlap=overlap), str(model), tmp_path / name)
        for name, model in (("plain", tiny_llama), ("begun", begins))
    )
    assert begun.digest != plain.digest
    assert begun.facts["begin_ids"] == [0]
    assert "begin_ids" not in plain.facts
    for expected, found in zip(texts_of(plain).values(), texts_of(begun).values(), strict=True):
        assert all(e.token_ids[0] == 0 and len(e.token_ids) <= 64 for e in found)
        joined = [
            np.concatenate(
                [e.token_ids[first + (overlap if n else 0) :] for n, e in enumerate(examples)]
            )
            for first, examples in ((0, expected), (1, found))
        ]
        assert np.array_equal(*joined)


def test_end_of_text_ends_whole_documents_and_is_a_target(tiny_llama, tmp_path):
    some = Source(name="topics", kind="pydoc_topics", limit=4)
    open_ended, ended = (
        prepare(settings(some, heldout=0, end_of_text=end), str(tiny_llama), tmp_path / str(end))
        for end in (False, True)
    )
    assert open_ended.digest != ended.digest
    assert ended.facts["end_of_text"] == 2
    for examples in texts_of(ended).values():
        ids = np.concatenate([example.token_ids for example in examples])
        assert (ids == 2).nonzero()[0].tolist() == [len(ids) - 1]
        assert len(examples[-1].loss_mask) == 1 or examples[-1].loss_mask[-1]
    before = [e.token_ids for examples in texts_of(open_ended).values() for e in examples]
    assert not any((ids == 2).any() for ids in before)


def test_conversations_are_left_alone(begins, tiny_llama, tmp_path):
    path = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So. " * 60}]
    path.write_text(
        "".join(
            json.dumps({"m": [turns[0], turns[1] | {"content": f"{n} " * 90}]}) + "\n"
            for n in range(3)
        )
    )
    chats = Source(name="chats", kind="jsonl", path=str(path), messages_column="m")
    made = [
        list(
            prepare(
                settings(chats, heldout=0, end_of_text=end), str(model), tmp_path / f"corpus-{end}"
            ).split("train")
        )
        for model, end in ((tiny_llama, False), (begins, True))
    ]
    assert [e.token_ids.tolist() for e in made[0]] == [e.token_ids.tolist() for e in made[1]]


def test_edges_that_cannot_be_are_refused(begins, tiny_llama, tmp_path):
    with pytest.raises(ConfigError, match="less the 1 that a text begins with"):
        prepare(settings(overlap=63), str(begins), tmp_path / "a")
    from transformers import AutoTokenizer

    endless = shutil.copytree(tiny_llama, tmp_path / "endless")
    tokenizer = AutoTokenizer.from_pretrained(endless)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(endless)
    with pytest.raises(ConfigError, match="no end token"):
        prepare(settings(end_of_text=True), str(endless), tmp_path / "b")


def test_windows_of_texts_that_begin_with_nothing_are_what_they_were():
    spoken = np.ones(130, bool)
    for overlap in (0, 8):
        for number, (ids, mask) in enumerate(windows((np.arange(130), spoken), 64, overlap)):
            assert mask.tolist() == [n >= overlap or number == 0 for n in range(len(ids))]


def test_a_teacher_on_a_hub_is_prepared_for_without_its_weights(tiny_llama, tmp_path, monkeypatch):
    """The hub's client is stood in for: no network here."""
    asked = []

    def snapshot(name, revision, ignore_patterns):
        asked.append((name, revision, ignore_patterns))
        here = tmp_path / "snapshot"
        shutil.copytree(
            tiny_llama, here, ignore=shutil.ignore_patterns(*ignore_patterns), dirs_exist_ok=True
        )
        return str(here)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    path = tmp_path / "a.txt"
    path.write_text("A text.")
    config = Prepare(source=(Source(name="a", path=str(path)),), heldout=0.0, window=64)
    corpus = prepare(config, "nobody/teacher", tmp_path / "corpus", revision="v1")
    assert len(corpus.split("train")) == 1
    assert {(name, revision) for name, revision, _ in asked} == {("nobody/teacher", "v1")}
    assert all("*.safetensors" in left_out for *_, left_out in asked)
