"""Formats that people have: what is recognised, what is said of it, and what comes out."""

import bz2
import gzip
import io
import json
import lzma
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.config import Prepare, Source
from stillroom.pipeline.corpus.opening import open_source
from stillroom.pipeline.corpus.preparing import prepare
from tests import tiny_image_models

CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
SHAREGPT = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]
SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [{"type": "function", "function": {"name": "w", "parameters": {"a": None}}}]


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def opened(path, **more):
    return open_source(Source(name="s", path=str(path), **more))


def read(path, **more):
    """The documents of a file, and what it was taken for."""
    source = opened(path, **more)
    return list(source.documents()), source.facts["format"]


FORMATS = {
    "messages": ({"messages": CHAT}, CHAT, 'messages in column "messages"'),
    "other column": ({"id": 3, "talk": CHAT}, CHAT, 'messages in column "talk"'),
    "json text": ({"messages": json.dumps(CHAT)}, CHAT, 'messages in column "messages"'),
    "sharegpt": (
        {"conversations": SHAREGPT},
        CHAT,
        'ShareGPT conversations in column "conversations"',
    ),
    "system column": ({"messages": CHAT, "system": "Be brief."}, [SYSTEM, *CHAT], "messages in"),
    "alpaca": (
        {"instruction": "Add.", "input": "2 and 2", "output": "4"},
        [{"role": "user", "content": "Add.\n\n2 and 2"}, {"role": "assistant", "content": "4"}],
        "Alpaca instructions",
    ),
    "alpaca without input": (
        {"instruction": "Who?", "input": "", "output": "Me."},
        CHAT,
        "Alpaca instructions",
    ),
    "completion": (
        {"prompt": "Who?", "completion": "Me."},
        CHAT,
        'questions in column "prompt" and answers in column "completion"',
    ),
    "completion of messages": ({"prompt": CHAT[:1], "completion": CHAT[1:]}, CHAT, "questions in"),
    "response": ({"question": "Who?", "answer": "Me."}, CHAT, 'questions in column "question"'),
    "roles of others": (
        {"messages": [{"role": "Human", "content": "Who?"}, {"role": "model", "content": "Me."}]},
        CHAT,
        "messages in",
    ),
    "values under roles": (
        {"messages": [{"role": "user", "value": "Who?"}, {"role": "assistant", "value": "Me."}]},
        CHAT,
        "messages in",
    ),
    "contents from somebody": (
        {"talk": [{"from": "User", "content": "Who?"}, {"from": "GPT", "content": "Me."}]},
        CHAT,
        "ShareGPT conversations",
    ),
    "instructions with a context": (
        {"instruction": "Add.", "context": "2 and 2", "response": "4"},
        [{"role": "user", "content": "Add.\n\n2 and 2"}, {"role": "assistant", "content": "4"}],
        '"instruction", "context" and "response"',
    ),
    "questions with a context": (
        {"context": "Two and two.", "question": "How many?", "answer": "Four."},
        [
            {"role": "user", "content": "Two and two.\n\nHow many?"},
            {"role": "assistant", "content": "Four."},
        ],
        'questions in column "question" and answers in column "answer", each question after its',
    ),
    "judged": (
        {"prompt": "Who?", "completion": "Me.", "label": False},
        [CHAT[0], CHAT[1] | {"weight": 0}],
        'those with "label" false not learned',
    ),
    "preference to a conversation": (
        {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": SHAREGPT[0]},
        CHAT,
        'the chosen answers of preferences in column "chosen" to column "conversations"',
    ),
    "preference": ({"chosen": CHAT, "rejected": CHAT[:1]}, CHAT, "chosen answers of preferences"),
    "preference with prompt": (
        {"prompt": "Who?", "chosen": "Me.", "rejected": "You."},
        CHAT,
        "chosen answers",
    ),
    "preference of messages": (
        {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[1:]},
        CHAT,
        "chosen answers",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_recognised_and_said(name, tmp_path):
    row, messages, words = FORMATS[name]
    (document,), said = read(write(tmp_path / "a.jsonl", [row]))
    assert list(document.messages) == messages
    assert words in said


def test_sharegpt_roles_calls_and_flags(tmp_path):
    talk = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": '{"name": "w", "arguments": {"a": 1}}', "weight": 0},
        {"from": "observation", "value": "cold"},
        {"from": "gpt", "value": "Cold."},
    ]
    row = {"conversations": talk, "tools": json.dumps(TOOLS)}
    (document,), _ = read(write(tmp_path / "a.jsonl", [row]))
    roles = [message["role"] for message in document.messages]
    assert roles == ["system", "user", "assistant", "tool", "assistant"]
    (call,) = document.messages[2]["tool_calls"]
    assert call["function"] == {"name": "w", "arguments": {"a": 1}}
    assert document.messages[2]["weight"] == 0
    assert document.context == {"tools": TOOLS}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [CHAT[0], {"role": "assistant"}]}, "message 2 says nothing: it has role"),
        ({"conversations": [{"from": "human"}]}, "message 1 says nothing"),
        ({"chosen": "Human: Who? Assistant: Me.", "rejected": "x"}, "without what was asked"),
        ({"instruction": "a", "input": 5, "output": "b"}, "column 'input' holds int"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "'history' is no list"),
    ],
)
def test_rows_that_say_nothing_are_refused(row, reason, tmp_path):
    with pytest.raises(CorpusError, match=reason):
        read(write(tmp_path / "a.jsonl", [row]))


def test_what_else_lies_in_a_folder_is_said(tmp_path):
    write(tmp_path / "a.jsonl", [{"text": "one"}])
    parquet(tmp_path / "b.parquet", [{"text": "two"}])
    (tmp_path / "c.png").write_bytes(b"")
    assert read(tmp_path)[1] == 'texts in column "text"; not read: a.jsonl'
    for name in "defg":
        (tmp_path / f"{name}.csv").write_text("")
    words = read(tmp_path)[1]
    assert words == 'texts in column "text"; not read: a.jsonl, d.csv, e.csv and 2 more'


def test_a_member_that_is_there_twice_in_a_sample_is_refused(tmp_path):
    path = tar(tmp_path / "a.tar", {"1.txt": b"one", "1.text": b"two"})
    with pytest.raises(CorpusError, match=r"sample 1: has a second text"):
        read(path)


def test_what_was_recognised_can_be_overruled(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "plain", "messages": CHAT}])
    assert read(path)[0][0].messages
    assert read(path, text_column="text")[0][0].text == "plain"
    assert read(path, format="text")[0][0].text == "plain"
    with pytest.raises(CorpusError, match="no column 'conversations'"):
        read(path, format="sharegpt")
    with pytest.raises(CorpusError, match=r"b\.jsonl:1: no column 'text'.*Did you mean 'txet'"):
        read(write(tmp_path / "b.jsonl", [{"txet": "x"}]))


COMPRESSIONS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
COMPRESSIONS[".zst"] = lambda data: pa.compress(data, "zstd", asbytes=True)


@pytest.mark.parametrize("compression", [*COMPRESSIONS, ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "bom"])
def test_json_in_every_wrapping(kind, compression, tmp_path):
    rows = [{"messages": CHAT, "n": n} for n in range(3)]
    lines = "\n".join(json.dumps(row) for row in rows)
    text = {"jsonl": lines, "json": json.dumps(rows, indent=1), "bom": "\ufeff" + lines}[kind]
    name = "a.json" if kind == "json" else "a.jsonl"
    path = tmp_path / (name + compression)
    data = text.encode()
    if compression == ".zst":
        with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd") as stream:
            stream.write(data)
    else:
        path.write_bytes(COMPRESSIONS[compression](data))
    documents, _ = read(path)
    assert [list(document.messages) for document in documents] == [CHAT] * 3
    line = {"jsonl": 2, "bom": 2, "json": json.dumps(rows, indent=1)[:].count("\n") // 3 + 2}[kind]
    assert documents[1].where == f"{path}:{line}"


def test_elements_of_any_size_are_read_one_at_a_time(tmp_path):
    rows = [{"text": "é" * length} for length in (1, 70_000, 3, 300_000, 0)]
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    documents, _ = read(tmp_path / "a.json")
    assert [document.text for document in documents] == [row["text"] for row in rows]


def parquet(path, rows, **more):
    pq.write_table(pa.Table.from_pylist(rows), path, **more)
    return path


CALLS = [
    {"role": "user", "content": "?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "a", "arguments": {"x": 1}}}],
    },
]
OTHER = [
    {"role": "user", "content": "?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "b", "arguments": {"y": "2"}}}],
    },
]


@pytest.mark.parametrize("kind", ["parquet", "arrow stream", "arrow file"])
def test_nulls_that_arrow_filled_in_are_gone_and_a_null_content_stays(kind, tmp_path):
    table = pa.Table.from_pylist(
        [{"messages": CALLS, "tools": TOOLS}, {"messages": OTHER, "tools": None}]
    )
    path = tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow")
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        make = pa.ipc.new_stream if kind == "arrow stream" else pa.ipc.new_file
        with make(str(path), table.schema) as writer:
            writer.write_table(table)
    (one, other), _ = read(path)
    assert list(one.messages) == CALLS
    assert list(other.messages) == OTHER
    assert "a" not in one.context["tools"][0]["function"]["parameters"]
    assert other.context == {}


def test_a_null_that_a_person_wrote_stays(tmp_path):
    calls = [{"type": "function", "function": {"name": "a", "arguments": {"x": None}}}]
    chat = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": calls, "refusal": None}]
    (document,), _ = read(write(tmp_path / "a.jsonl", [{"messages": chat, "tools": TOOLS}]))
    assert document.messages[1] == {"role": "assistant", "content": None, "tool_calls": calls}
    assert document.context["tools"] == TOOLS


def test_dictionary_columns(tmp_path):
    text = pa.array(["one two", "one two", "three"]).dictionary_encode()
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    assert [d.text for d in read(tmp_path / "a.parquet")[0]] == ["one two", "one two", "three"]


def test_folders_that_datasets_saved(tmp_path):
    import datasets

    train = datasets.Dataset.from_list([{"messages": CHAT}] * 5)
    test = datasets.Dataset.from_list([{"messages": CHAT[:1]}])
    train.save_to_disk(str(tmp_path / "one"), num_shards=2)
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(str(tmp_path / "both"))
    for name in ("one", "both"):
        documents, said = read(tmp_path / name)
        assert [list(document.messages) for document in documents] == [CHAT] * 5
        assert said == 'messages in column "messages"'
    assert len(read(tmp_path / "both", split="test")[0]) == 1
    with pytest.raises(CorpusError, match=r"no split 'tset'.*Did you mean 'test'"):
        read(tmp_path / "both", split="tset")


def test_what_lies_beside_the_data_is_not_read(tmp_path):
    write(tmp_path / "a.jsonl", [{"messages": CHAT}])
    (tmp_path / "dataset_info.json").write_text('{"features": {}}')
    (tmp_path / "._a.jsonl").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / "README.md").write_text("about")
    (tmp_path / ".cache").mkdir()
    write(tmp_path / ".cache" / "b.jsonl", [{"messages": CHAT}])
    documents, _ = read(tmp_path)
    assert [document.where for document in documents] == [f"{tmp_path / 'a.jsonl'}:1"]


def tar(path, members):
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def test_webdataset_tars(tmp_path):
    picture = tiny_image_models.image(1)
    members = {
        "a/0.png": picture,
        "a/0.txt": b"A house.\n",
        "a/._0.txt": b"x",
        "b.1.jpg": b"j",
        "b.json": json.dumps({"text": "Two."}).encode(),
    }
    documents, said = read(tar(tmp_path / "a.tar", members))
    assert said == 'captions in column "text" of images in column "image"'
    assert [d.messages[1]["content"] for d in documents] == ["A house.", "Two."]
    assert [d.images for d in documents] == [(picture,), (b"j",)]


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return tiny_image_models.save("llava", tmp_path_factory.mktemp("models") / "llava")


def test_llava_json_with_a_folder_of_images(llava, tmp_path):
    (tmp_path / "images" / "train").mkdir(parents=True)
    data = tiny_image_models.image(2)
    (tmp_path / "images" / "train" / "a.png").write_bytes(data)
    rows = [
        {
            "id": "1",
            "image": "train/a.png",
            "conversations": [{"from": "human", "value": "<image>\nWho?"}, SHAREGPT[1]],
        },
        {"id": "2", "conversations": SHAREGPT},
    ]
    (tmp_path / "llava.json").write_text(json.dumps(rows))
    source = Source(
        name="l", path=str(tmp_path / "llava.json"), images_folder=str(tmp_path / "images")
    )
    said = []
    config = Prepare(source=(source,), heldout=0.0)
    corpus = prepare(config, str(llava), tmp_path / "corpus", say=said.append)
    known = 'ShareGPT conversations in column "conversations", images in column "image"'
    assert said == [f'{known} (l); not read: "id"']
    with_image, without = corpus.split("train")
    assert corpus.image_bytes(with_image.images[0].sha256) == data
    assert without.images == ()


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT, "video": "a.mp4"},
        {"messages": [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": "a"}]}]},
    ],
)
def test_video_and_audio_are_refused_by_name(row, tmp_path):
    with pytest.raises(CorpusError, match=r"a\.jsonl:1: holds (video|audio)"):
        read(write(tmp_path / "a.jsonl", [row]))


def test_a_context_beside_messages_is_refused(tmp_path):
    row = {"context": "Two.", "question": CHAT[:1] * 2, "answer": "Four."}
    path = write(tmp_path / "a.jsonl", [row])
    with pytest.raises(CorpusError, match=r"a context beside a question of several messages"):
        read(path)


def test_columns_that_are_not_read_are_told(tiny_llama, tmp_path):
    row = {"prompt": "Who?", "completion": "Me.", "id": 4, "score": None, "by": "me"}
    source = Source(name="a", kind="jsonl", path=str(write(tmp_path / "a.jsonl", [row])))
    said: list[str] = []
    config = Prepare(source=(source,), window=64, heldout=0.0)
    prepare(config, str(tiny_llama), tmp_path / "corpus", say=said.append)
    assert said[0].endswith('(a); not read: "id", "by"')
