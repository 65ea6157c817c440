"""Corpora of conversations with images: where images may come from, spans, masks and bad files."""

import base64
import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.capture.images import images_of
from stillroom.pipeline.config import Prepare, Source
from stillroom.pipeline.corpus.image_chat import load_processor
from stillroom.pipeline.corpus.images import place_images
from stillroom.pipeline.corpus.preparing import Corpus, prepare
from tests import tiny_image_models


@pytest.fixture(scope="module", params=tiny_image_models.FAMILIES)
def family(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / request.param
    return request.param, tiny_image_models.save(request.param, directory)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return tiny_image_models.save("llava", tmp_path_factory.mktemp("models") / "llava")


def conversation(images, question="<image>What is this, beside <image>?", answer="A red house."):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": images}


def prepared(model, directory, rows, **settings) -> Corpus:
    path = directory / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    columns = {"messages_column": "messages", "image_column": "images"}
    source = Source(name="pictures", kind="jsonl", path=str(path), **columns)
    config = Prepare(source=(source,), **{"heldout": 0.0, "window": 256} | settings)
    return prepare(config, str(model), directory / "corpus")


def picture(directory, name, seed, **shape):
    data = tiny_image_models.image(seed, **shape)
    (directory / name).write_bytes(data)
    return data


def test_spans_are_the_processors_own_placeholders_and_no_target_lies_in_them(family, tmp_path):
    from transformers import AutoProcessor

    name, model = family
    first = picture(tmp_path, "a.png", 1)
    second = picture(tmp_path, "b.jpg", 2, width=90, height=40, form="JPEG")
    corpus = prepared(model, tmp_path, [conversation(["a.png", "b.jpg"])])
    example = corpus.split("train")[0]
    processor = AutoProcessor.from_pretrained(model)
    assert [i.sha256 for i in example.images] == [
        hashlib.sha256(data).hexdigest() for data in (first, second)
    ]
    assert [corpus.image_bytes(i.sha256) for i in example.images] == [first, second]
    image_id = processor.image_token_id
    inside = np.zeros(len(example.token_ids), dtype=bool)
    for image in example.images:
        inside[image.start : image.start + image.length] = True
    assert (example.token_ids == image_id).sum() > len(example.images)
    assert inside[example.token_ids == image_id].all()
    assert not (inside & example.loss_mask).any()
    targets = processor.tokenizer.decode(example.token_ids[example.loss_mask])
    assert targets == "A red house.<|im_end|>"
    outside = processor.tokenizer.decode(example.token_ids[~inside])
    frame = "<|vision_start|><|vision_end|>" if name in ("qwen2_5_vl", "qwen3_vl") else ""
    question = f"{frame}What is this, beside {frame}?"
    assert f"user\n{question}<|im_end|>" in outside


def test_tokens_equal_one_call_of_the_processor(family, tmp_path):
    from transformers import AutoProcessor

    from stillroom.pipeline.images import decode_image

    _, model = family
    data = picture(tmp_path, "a.png", 3, width=70, height=33)
    corpus = prepared(model, tmp_path, [conversation(["a.png"], "<image>Name it.")])
    parts = [{"type": "image"}, {"type": "text", "text": "Name it."}]
    answer = [{"type": "text", "text": "A red house."}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    processor = AutoProcessor.from_pretrained(model)
    text = processor.apply_chat_template(messages, tokenize=False)
    made = processor(text=[text], images=[[decode_image(data, "a.png")]])
    assert corpus.split("train")[0].token_ids.tolist() == made["input_ids"][0]


def test_an_images_content_is_part_of_the_examples_identity(llava, tmp_path):
    picture(tmp_path, "a.png", 4)
    one = prepared(llava, tmp_path, [conversation(["a.png"], "<image>?")])
    ids, digest = [e.example_id for e in one.split("train")], one.digest
    picture(tmp_path, "a.png", 5)
    two = prepared(llava, tmp_path, [conversation(["a.png"], "<image>?")])
    assert two.digest != digest
    assert [e.example_id for e in two.split("train")] != ids
    same = [e.token_ids.tolist() for e in one.split("train")]
    assert same == [e.token_ids.tolist() for e in two.split("train")]


@pytest.mark.parametrize("form", ["path", "data_url", "bytes", "struct", "parts"])
def test_images_may_be_given_in_every_usual_way(llava, tmp_path, form):
    data = picture(tmp_path, "a.png", 6)
    columns = {"messages_column": "messages", "image_column": "images"}
    row = conversation(["a.png"], "<image>?")
    kind = "jsonl"
    if form == "data_url":
        row["images"] = "data:image/png;base64," + base64.b64encode(data).decode()
    elif form == "parts":
        columns.pop("image_column")
        row["messages"][0]["content"] = [
            {"type": "image", "path": "a.png"},
            {"type": "text", "text": "?"},
        ]
    elif form in ("bytes", "struct"):
        kind = "parquet"
        row["images"] = [data] if form == "bytes" else [{"bytes": data, "path": None}]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text(json.dumps(row))
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)
    source = Source(name="p", kind=kind, path=str(path), **columns)
    corpus = prepare(Prepare(source=(source,), heldout=0.0), str(llava), tmp_path / "corpus")
    (example,) = corpus.split("train")
    assert corpus.image_bytes(example.images[0].sha256) == data


def test_an_image_with_a_caption_beside_it_is_a_conversation(llava, tmp_path):
    data = picture(tmp_path, "house.png", 7)
    (tmp_path / "house.txt").write_text("A red house.\n")
    source = Source(name="captions", kind="images", path=str(tmp_path))
    corpus = prepare(Prepare(source=(source,), heldout=0.0), str(llava), tmp_path / "corpus")
    (example,) = corpus.split("train")
    assert corpus.image_bytes(example.images[0].sha256) == data
    assert example.loss_mask.sum() > 2
    (tmp_path / "house.txt").unlink()
    with pytest.raises(CorpusError, match="no caption"):
        prepare(Prepare(source=(source,), heldout=0.0), str(llava), tmp_path / "other")


def test_two_captions_of_one_image_are_two_examples_of_one_picture(llava, tmp_path):
    data = picture(tmp_path, "a.png", 7)
    picture(tmp_path, "copy.png", 7)
    rows = [
        conversation([name], "<image>?", answer)
        for name, answer in (("a.png", "A red house."), ("copy.png", "A barn."))
    ]
    corpus = prepared(llava, tmp_path, rows)
    one, two = corpus.split("train")
    assert one.example_id != two.example_id
    assert one.images[0].sha256 == two.images[0].sha256 == hashlib.sha256(data).hexdigest()
    assert images_of(corpus) == (one.images[0].sha256,)
    files = [path for path in (corpus.directory / "images").rglob("*") if path.is_file()]
    assert [path.read_bytes() for path in files] == [data]


def test_conversations_without_an_image_may_stand_among_the_others(llava, tmp_path):
    picture(tmp_path, "a.png", 8)
    rows = [conversation(["a.png"], "<image>?"), conversation([], "And now?")]
    examples = prepared(llava, tmp_path, rows).split("train")
    assert [len(example.images) for example in examples] == [1, 0]


def test_what_does_not_fit_the_window_with_its_images_is_left_out_and_counted(llava, tmp_path):
    picture(tmp_path, "a.png", 9)
    rows = [conversation(["a.png"], "<image>?"), conversation(["a.png"], "<image>" + "long " * 80)]
    corpus = prepared(llava, tmp_path, rows, window=64)
    assert corpus.facts["dropped"] == {"conversations_with_images_longer_than_the_window": 1}
    assert len(corpus.split("train")) == 1


BAD = {
    "missing": (lambda data: None, "rows.jsonl:1.*No such file"),
    "truncated": (lambda data: data[: len(data) // 2], "rows.jsonl:1 image 1: is damaged or cut"),
    "not an image": (lambda data: b"<html>404</html>", "rows.jsonl:1 image 1: is not an image"),
    "empty": (lambda data: b"", "rows.jsonl:1 image 1: is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_image_files_are_named(llava, tmp_path, case):
    change, message = BAD[case]
    data = change(tiny_image_models.image(10))
    if data is not None:
        (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(CorpusError, match=message):
        prepared(llava, tmp_path, [conversation(["a.png"], "<image>?")])
    assert not (tmp_path / "corpus").exists()


def test_an_address_is_not_fetched(llava, tmp_path):
    with pytest.raises(CorpusError, match="Download images"):
        prepared(llava, tmp_path, [conversation(["https://example.org/a.png"], "<image>?")])


@pytest.mark.parametrize("question", ["<image><image>?", "<image>?<image><image>"])
def test_another_number_of_places_than_of_images_is_an_error(llava, tmp_path, question):
    picture(tmp_path, "a.png", 11)
    with pytest.raises(CorpusError, match=r"rows.jsonl:1: 1 images for [23] places"):
        prepared(llava, tmp_path, [conversation(["a.png"], question)])


def test_images_without_a_place_come_first(llava, tmp_path):
    placed = place_images(
        ({"role": "system", "content": "s"}, {"role": "user", "content": "u"}), 2, ""
    )
    assert placed[1]["content"] == [{"type": "image"}] * 2 + [{"type": "text", "text": "u"}]


def test_a_text_teacher_cannot_read_images(tiny_llama, tmp_path):
    picture(tmp_path, "a.png", 12)
    with pytest.raises(CorpusError, match=r"has no image processor|no processor"):
        prepared(tiny_llama, tmp_path, [conversation(["a.png"], "<image>?")])


def two_questions(thoughts=""):
    first, second = (
        conversation([], "<image>One?", f"{thoughts}A."),
        conversation([], "<image>Two?"),
    )
    return {"messages": [*first["messages"], *second["messages"]], "images": ["a.png", "b.png"]}


def test_an_answer_of_its_own_has_only_the_images_that_were_shown_until_then(llava, tmp_path):
    shown = [picture(tmp_path, name, seed) for name, seed in (("a.png", 13), ("b.png", 14))]
    hashes = [hashlib.sha256(data).hexdigest() for data in shown]
    first, second = prepared(llava, tmp_path, [two_questions()], turns="each").split("train")
    assert [image.sha256 for image in first.images] == hashes[:1]
    assert [image.sha256 for image in second.images] == hashes
    (both,) = prepared(llava, tmp_path, [two_questions()]).split("train")
    assert both.token_ids.tolist() == second.token_ids.tolist()
    assert both.loss_mask.sum() == first.loss_mask.sum() + second.loss_mask.sum()


def test_a_long_conversation_with_images_is_cut_between_its_questions(llava, tmp_path):
    shown = [picture(tmp_path, name, seed) for name, seed in (("a.png", 15), ("b.png", 16))]
    whole = len(prepared(llava, tmp_path, [two_questions()]).split("train")[0].token_ids)
    corpus = prepared(llava, tmp_path, [two_questions()], window=whole - 1)
    examples = corpus.split("train")
    assert [[corpus.image_bytes(i.sha256) for i in e.images] for e in examples] == [
        [data] for data in shown
    ]
    assert corpus.facts["dropped"] == {"conversations_cut_into_pieces": 1}


def test_an_image_in_an_answer_is_refused(llava, tmp_path):
    """A model never writes the tokens that an image is read as."""
    picture(tmp_path, "a.png", 1)
    row = conversation(["a.png"], "What is this?", "Like this: <image>")
    with pytest.raises(CorpusError, match=r"rows\.jsonl:1: message 2: an image in an answer"):
        prepared(llava, tmp_path, [row])


@pytest.mark.parametrize("content", [4, {"a": 1}, [4]])
def test_contents_that_are_neither_text_nor_parts_are_refused(content, llava, tmp_path):
    with pytest.raises(CorpusError, match=r"rows\.jsonl:1: message 1: a content holds (int|dict)"):
        prepared(llava, tmp_path, [conversation([], content)])


def test_texts_among_parts_are_parts(llava, tmp_path):
    picture(tmp_path, "a.png", 1)
    row = conversation(["a.png"], ["What is ", {"type": "image"}])
    (example,) = prepared(llava, tmp_path, [row]).split("train")
    assert len(example.images) == 1


@pytest.mark.parametrize("image", [[], [{"type": "image"}]])
def test_an_image_token_that_stands_for_no_image_is_refused(image, family, tmp_path):
    """A processor gives the next image to the token's first place, whoever wrote it there."""
    _, model = family
    token = load_processor(model).image_token
    picture(tmp_path, "a.png", 1)
    row = conversation(
        ["a.png"] * len(image), [{"type": "text", "text": f"What is {token}?"}, *image]
    )
    found = rf"rows\.jsonl:1: the rendered text holds .* {1 + len(image)} times for {len(image)}"
    with pytest.raises(CorpusError, match=found):
        prepared(model, tmp_path, [row])
