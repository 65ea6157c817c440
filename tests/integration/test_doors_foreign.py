"""Caches of other programs come in whole or not at all; ours go out and are read again."""

import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.numpy import load_file

from stillroom.cache_schemas.errors import StillroomError
from stillroom.pipeline import config
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.capture.job import capture
from stillroom.pipeline.corpus.preparing import prepare
from stillroom.pipeline.doors import distillkit_files
from stillroom.pipeline.doors.foreign import Origin, import_answers
from stillroom.pipeline.doors.leaving import export
from stillroom.pipeline.doors.sources import source_of
from stillroom.stages.__main__ import run
from tests import memory_cache

K, VOCAB = 8, 768


@pytest.fixture(scope="module")
def cache(tiny_llama, tmp_path_factory):
    """Of texts that are learned from their second token on, with every token's states."""
    texts = [whole(one) for one in memory_cache.examples(9)]
    made = memory_cache.captured(
        tiny_llama, texts, k=K, hidden_layers=(1, "final"), tail_draws=0, hidden_codec="bf16"
    )
    return TeacherCache.open(made.write(tmp_path_factory.mktemp("cache") / "cache"))


@pytest.fixture(scope="module")
def answers_alone(tiny_llama, tmp_path_factory):
    """Of texts whose first third is not learned."""
    made = memory_cache.captured(tiny_llama, memory_cache.examples(9), k=K, tail_draws=0)
    return TeacherCache.open(made.write(tmp_path_factory.mktemp("cache") / "cache"))


def whole(example):
    from dataclasses import replace

    from stillroom.pipeline.record import content_id

    mask = np.ones(len(example.token_ids), dtype=bool)
    return replace(example, loss_mask=mask, example_id=content_id(example.token_ids, mask))


def taken(form, source, target, tokenizer, config="", **more):
    found = source_of(form, source, str(tokenizer), str(config))
    origin = Origin(form, "a teacher", str(tokenizer), lossy=found.lossy, **more)
    import_answers(found.read, origin, target, 4)
    return TeacherCache.open(target)


def same_answers(found, expected) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.example.token_ids, other.example.token_ids)
        assert one.first_row == other.first_row
        np.testing.assert_array_equal(one.signals["topk_ids"], other.signals["topk_ids"])
        np.testing.assert_allclose(
            one.signals["topk_logprobs"], other.signals["topk_logprobs"], rtol=0, atol=2e-6
        )


# ---- DistillKit, written by a script of its own ----


def bits_of(numbers, bits) -> list[int]:
    stream = "".join(f"{int(number):0{bits}b}" for number in numbers)
    stream += "0" * (-len(stream) % 8)
    return [int(stream[at : at + 8], 2) for at in range(0, len(stream), 8)]


def bf16(values) -> np.ndarray:
    """Nearest with 8 bits of mantissa, ties to even."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def distillkit(directory, records, packed=False):
    """k = 8: four values in bf16, the others as 1, t and sqrt t, and 3 bits of what is left."""
    settings = {
        "d": VOCAB,
        "k": K,
        "exact_k": 4,
        "exact_dtype": "bfloat16",
        "polynomial_terms": [0, 1, "sqrt"],
        "term_dtype": "float32",
        "residual_bins": [{"scale_dtype": "float16", "element_bits": 3, "num_elements": 4}],
        "delta_encoding": False,
        "error_diffusion": False,
        "normalize_t": False,
    }
    directory.mkdir()
    (directory / "compression_config.yaml").write_text(yaml.safe_dump(settings))
    t = np.arange(4.0)
    terms = np.stack([t**0, t, np.sqrt(t)], axis=1)
    rows = []
    for record in records:
        values, ids = record.signals["topk_logprobs"], record.signals["topk_ids"]
        lists = []
        for row in values:
            fit = np.linalg.lstsq(terms, row[4:], rcond=None)[0].astype(np.float32)
            left = row[4:] - terms @ fit
            scale = np.float16(max(abs(left).max() / 4, 1e-4))
            levels = np.clip(np.round(left / np.float32(scale)), -4, 3) + 4
            data = bf16(row[:4]).tobytes() + fit.tobytes() + scale.tobytes()
            lists.append([*data, *bits_of(levels, 3)])
        rows.append((record.example.token_ids, lists, [bits_of(one, 10) for one in ids]))
    table = {"input_ids": [], "compressed_logprobs": [], "bytepacked_indices": []}
    if packed:  # two documents a row, each without its last token, as pack_logits cuts them
        table["attention_mask"] = []
        for (a, values, ids), (b, more, others) in zip(rows[::2], rows[1::2]):
            table["input_ids"].append([*a[:-1], *b[:-1]])
            table["compressed_logprobs"].append([*values, *more])
            table["bytepacked_indices"].append([*ids, *others])
            table["attention_mask"].append([1] * len(values) + [2] * len(more))
    else:
        for tokens, values, ids in rows:
            table["input_ids"].append(tokens)
            table["compressed_logprobs"].append(values)
            table["bytepacked_indices"].append(ids)
    pq.write_table(pa.table(table), directory / "data_0.parquet")
    return directory


def test_distillkit_files_are_taken(cache, tiny_llama, tmp_path):
    found = taken("distillkit", distillkit(tmp_path / "theirs", cache), tmp_path / "c", tiny_llama)
    assert found.signals == ("topk_ids", "topk_logprobs")  # no tail, no lse: they have none
    assert found.plan.facts["engine"]["name"] == "foreign"
    for one, other in zip(found, cache, strict=True):
        np.testing.assert_array_equal(one.example.token_ids, other.example.token_ids)
        theirs = dict(zip(other.signals["topk_ids"][3], other.signals["topk_logprobs"][3]))
        ours = dict(zip(one.signals["topk_ids"][3], one.signals["topk_logprobs"][3]))
        assert theirs.keys() == ours.keys()
        # 8 bits of mantissa, and a third of what a curve of three terms leaves.
        assert all(abs(ours[word] - theirs[word]) < 0.03 for word in ours)


def test_packed_documents_come_apart_without_what_is_not_there(cache, tiny_llama, tmp_path):
    source = distillkit(tmp_path / "theirs", list(cache)[:8], packed=True)
    found = taken("distillkit", source, tmp_path / "c", tiny_llama)
    assert len(found) == 8
    for one, other in zip(found, cache):
        np.testing.assert_array_equal(one.example.token_ids, other.example.token_ids[:-1])
        assert set(one.signals["topk_ids"][0]) == set(other.signals["topk_ids"][0])


def test_a_foreign_cache_trains(cache, tiny_llama, tmp_path):
    from transformers import AutoModelForCausalLM, TrainingArguments

    from stillroom.hf import CachedTrainer

    source = distillkit(tmp_path / "theirs", cache)
    taken("distillkit", source, tmp_path / "c", tiny_llama)
    args = TrainingArguments(
        str(tmp_path / "run"), max_steps=8, learning_rate=1e-3, logging_steps=1, use_cpu=True
    )
    args.report_to, args.disable_tqdm = [], True
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    trainer = CachedTrainer(model, args, cache=str(tmp_path / "c"))
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < 0.9 * losses[0]


def test_distillkit_files_without_their_settings(cache, tiny_llama, tmp_path):
    source = distillkit(tmp_path / "theirs", cache)
    told = (source / "compression_config.yaml").rename(tmp_path / "elsewhere.yaml")
    with pytest.raises(StillroomError, match=r"row 1: columns .* without a description.*--config"):
        taken("distillkit", source, tmp_path / "c", tiny_llama)
    taken("distillkit", source, tmp_path / "d", tiny_llama, told)
    told.write_text(told.read_text().replace("d: 768", "d: 151936"))
    with pytest.raises(StillroomError, match=r"10 bytes of ids a row; expected 18"):
        taken("distillkit", source, tmp_path / "e", tiny_llama, told)


# ---- what cannot be right ----


def raw(directory, ids, values, tokens=(5, 6, 7)):
    directory.mkdir()
    rows = {"input_ids": [[4, 5, 6]] * 5 + [list(tokens)]}
    rows["token_ids"] = [[[1, 2], [3, 4]]] * 5 + [ids]
    rows["top_values"] = [[[-1.0, -2.0], [-1.0, -2.0]]] * 5 + [values]
    pq.write_table(pa.table(rows), directory / "data_0.parquet")
    return directory


GOOD = [[-1.0, -2.0], [-1.0, -2.0]]
BAD = [
    ([[1, 2], [3, 768]], GOOD, "row 6: ids of answers hold 768; expected 0 to 767"),
    ([[1, 2], [3, 3]], GOOD, "row 6: row 1 names an id twice"),
    ([[1, 2], [3, 4]], [[-1.0, -2.0], [0.5, -2.0]], r"a log-probability of 0\.5 in row 1"),
    ([[1, 2], [3, 4]], [[-1.0, -2.0], [float("nan"), -2.0]], "a log-probability of .* in row 1"),
    ([[1, 2], [3, 4]], [[-0.1, -0.2], [-1.0, -2.0]], r"of row 0 add up to 1\.7236; expected at"),
    ([[1, 2]], [[-1.0, -2.0]], "1 rows of answers for 3 tokens"),
]


@pytest.mark.parametrize(("ids", "values", "message"), BAD)
def test_what_cannot_be_right_names_file_and_row(ids, values, message, tiny_llama, tmp_path):
    source = raw(tmp_path / "theirs", ids, values)
    with pytest.raises(StillroomError, match=message) as caught:
        taken("distillkit", source, tmp_path / "c", tiny_llama)
    assert "data_0.parquet" in str(caught.value)
    assert not (tmp_path / "c").exists()  # nothing half-imported


def test_tokens_beyond_the_vocabulary(tiny_llama, tmp_path):
    source = raw(tmp_path / "theirs", [[1, 2], [3, 4]], GOOD, tokens=(5, 6, 900))
    with pytest.raises(StillroomError, match="input_ids hold 900; expected 0 to 767"):
        taken("distillkit", source, tmp_path / "c", tiny_llama)
    taken("distillkit", source, tmp_path / "c", tiny_llama, vocab_size=1000)


def test_an_import_that_was_stopped_goes_on(cache, tiny_llama, tmp_path):
    source = distillkit(tmp_path / "theirs", cache)
    read, lossy, _ = source_of("distillkit", source, str(tiny_llama))
    origin = Origin("distillkit", "a teacher", str(tiny_llama), lossy=lossy)

    def stop(done, _all):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_answers(read, origin, tmp_path / "c", 4, stop)
    with pytest.raises(StillroomError, match="not sealed"):
        TeacherCache.open(tmp_path / "c")
    import_answers(read, origin, tmp_path / "c", 4)
    assert len(TeacherCache.open(tmp_path / "c")) == 9


# ---- JSON ----


def test_prompt_logprobs_of_vllm(answers_alone, tiny_llama, tmp_path):
    """Out in vLLM's form, and in again: tokens far down the list are beside it."""
    assert export(answers_alone, tmp_path / "out", "jsonl")
    found = taken("prompt_logprobs", tmp_path / "out", tmp_path / "c", tiny_llama)
    same_answers(found, answers_alone)
    for one, other in zip(found, answers_alone, strict=True):
        assert one.example.example_id == other.example.example_id
        for name in ("token_logprob", "token_rank"):
            np.testing.assert_array_equal(one.signals[name], other.signals[name])


@pytest.mark.parametrize("profile", ["small", "strict"])
def test_what_was_rounded_comes_back_in(profile, tiny_llama, tmp_path):
    """Lists are rounded where the token's own figure is not, and still fall with their ranks."""
    made = memory_cache.captured(tiny_llama, memory_cache.examples(9), k=K, profile=profile)
    cache = TeacherCache.open(made.write(tmp_path / "cache"))
    assert export(cache, tmp_path / "out", "jsonl")
    found = taken("prompt_logprobs", tmp_path / "out", tmp_path / "c", tiny_llama)
    assert len(found) == len(cache)
    for one, other in zip(found, cache, strict=True):
        np.testing.assert_array_equal(one.signals["token_rank"], other.signals["token_rank"])
        gap = one.signals["token_logprob"] - other.signals["token_logprob"]
        assert abs(gap).max() < 0.5


def test_top_logprobs_of_a_server(tiny_llama, tiny_tokenizer, tmp_path):
    def token(word, value, **more):
        return {"token": tiny_tokenizer.decode([word]), "logprob": value} | more

    tops = [token(300, -0.5), token(301, -1.5)]
    content = [token(300, -0.5, top_logprobs=tops), token(400, -7.0, top_logprobs=tops)]
    line = {
        "messages": [{"role": "user", "content": "a word"}],
        "choices": [{"logprobs": {"content": content}}],
    }
    source = tmp_path / "answers.jsonl"
    source.write_text(json.dumps(line) + "\n")
    found = taken("top_logprobs", source, tmp_path / "c", tiny_llama)[0]
    tokens = found.example.token_ids
    assert tokens[-2:].tolist() == [300, 400]
    assert found.first_row == len(tokens) - 3
    assert found.example.loss_mask.sum() == 2
    assert found.signals["topk_ids"].tolist() == [[300, 301], [300, 301]]
    assert found.signals["token_logprob"].tolist() == [-0.5, -7.0]
    content[0]["top_logprobs"][0]["token"] = "no word at all"
    source.write_text(json.dumps(line) + "\n")
    with pytest.raises(StillroomError, match=r":1: the token 'no word at all' is none.*ids"):
        taken("top_logprobs", source, tmp_path / "d", tiny_llama)


# ---- out ----


def test_parquet_says_what_the_cache_says(cache, tmp_path):
    assert [str(name) for name in export(cache, tmp_path / "out", "parquet")] == ["data_0.parquet"]
    rows = pq.read_table(tmp_path / "out").to_pylist()
    for row, record in zip(rows, cache, strict=True):
        for name in cache.plan.row_signals:
            found = np.array(row[name], dtype=record.signals[name].dtype)
            np.testing.assert_array_equal(found, record.signals[name])
        assert row["input_ids"] == record.example.token_ids.tolist()
        assert row["first_row"] == record.first_row


def test_distillkit_files_lose_nothing(cache, tiny_llama, tmp_path):
    export(cache, tmp_path / "out", "distillkit")
    settings = distillkit_files.read_settings(tmp_path / "out")
    assert settings is not None
    assert settings.exact
    same_answers(taken("distillkit", tmp_path / "out", tmp_path / "c", tiny_llama), cache)


def test_hidden_states_for_draft_models(cache, tmp_path):
    export(cache, tmp_path / "out", "speculators")
    rows = datasets.load_from_disk(str(tmp_path / "out"))
    for number, record in enumerate(cache):
        held = load_bf16(tmp_path / "out" / "hidden_states" / f"hs_{number}.safetensors")
        assert torch.equal(held["token_ids"], rows[number]["input_ids"])
        assert rows[number]["loss_mask"].tolist() == record.example.loss_mask[:-1].tolist()
        assert rows[number]["seq_len"] == len(held["token_ids"])
        assert held["token_ids"].tolist() == record.example.token_ids[:-1].tolist()
        assert held["hidden_states"].shape == (len(held["token_ids"]), 2, 64)
        for place, name in enumerate(("hidden.1", "hidden.final")):
            states = held["hidden_states"][:, place].float().numpy()
            np.testing.assert_array_equal(states, record.signals[name])  # the cache's are bf16 too


def load_bf16(path):
    from safetensors.torch import load_file

    return load_file(path)


def test_safetensors_hold_every_signal(cache, tmp_path):
    export(cache, tmp_path / "out", "safetensors")
    held = load_file(tmp_path / "out" / "3.safetensors")
    for name, array in cache[3].signals.items():
        np.testing.assert_array_equal(held[name], array)


def test_what_a_format_has_no_place_for(cache, answers_alone, tmp_path):
    with pytest.raises(
        StillroomError, match=r"lacks rows from the first token on.*as text .*overlap = 0.*parquet"
    ):
        export(answers_alone, tmp_path / "a", "distillkit")
    with pytest.raises(StillroomError, match="lacks hidden states"):
        export(answers_alone, tmp_path / "a", "speculators")
    with pytest.raises(StillroomError, match=r"no format 'parket'.*Did you mean 'parquet'"):
        export(cache, tmp_path / "a", "parket")
    assert not (tmp_path / "a").exists()
    (tmp_path / "a").mkdir()
    with pytest.raises(StillroomError, match="is already there"):
        export(cache, tmp_path / "a", "parquet")


def test_chats_prepared_as_text_have_rows_from_their_first_token_on(
    tiny_llama, tiny_tokenizer, tmp_path
):
    """What the refusal of a chat cache says to do."""
    chats = [
        [
            {"role": "user", "content": f"What is {n}?"},
            {"role": "assistant", "content": f"It is {n}."},
        ]
        for n in range(4)
    ]
    texts = [{"text": tiny_tokenizer.apply_chat_template(one, tokenize=False)} for one in chats]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, texts)))
    source = {"name": "a", "path": str(tmp_path / "rows.jsonl"), "text_column": "text"}
    settings = {"k": K, "tail_draws": 0, "hidden_layers": ["final"], "hidden_codec": "bf16"}
    document = {
        "name": "a",
        "directory": str(tmp_path / "run"),
        "teacher": {"model": str(tiny_llama), "dtype": "float32"},
        "prepare": {"window": 128, "heldout": 0.0, "source": [source]},
        "capture": settings,
    }
    run = config.parse(document, "test")
    prepare(run.prepare, str(tiny_llama), run.path("corpus"))
    capture(run, engine="reference")
    made = TeacherCache.open(run.path("cache"))
    assert len(made) == 4
    assert export(made, tmp_path / "distillkit", "distillkit")
    assert export(made, tmp_path / "speculators", "speculators")


def test_others_open_what_was_exported(cache, tmp_path):
    import duckdb
    import pandas

    export(cache, tmp_path / "out", "parquet")
    file = tmp_path / "out" / "data_0.parquet"
    wanted = [record.example.example_id for record in cache]
    assert pandas.read_parquet(file)["example_id"].tolist() == wanted
    query = f"select example_id, len(topk_ids) from '{file}' order by file_row_number"
    opened = (
        duckdb.connect()
        .sql(query.replace(f"'{file}'", f"read_parquet('{file}', file_row_number = true)"))
        .fetchall()
    )
    assert opened == [(record.example.example_id, record.num_rows) for record in cache]
    loaded = datasets.load_dataset("parquet", data_files=str(file), cache_dir=str(tmp_path / "hf"))
    assert loaded["train"]["example_id"] == wanted
    index = tmp_path / "index"
    index.mkdir()
    (index / "0.parquet").write_bytes(cache.storage.read("index/000.parquet"))
    assert len(pandas.read_parquet(index)) == len(cache)


def test_the_commands(cache, tiny_llama, tmp_path, capsys):
    where = str(cache.storage.location)
    assert run(["cache", "export", where, str(tmp_path / "out"), "--to", "distillkit"]) == 0
    arguments = ["cache", "import", str(tmp_path / "out"), str(tmp_path / "c")]
    named = ["--from", "distillkit", "--teacher", "t", "--tokenizer", str(tiny_llama)]
    assert run([*arguments, *named]) == 0
    assert run(["cache", "verify", str(tmp_path / "c")]) == 0
    assert run(["cache", "show", str(tmp_path / "c")]) == 0
    named[1] = "distilkit"
    assert run([*arguments, *named]) == 2
    assert "Did you mean 'distillkit'" in capsys.readouterr().err


# ---- axolotl's rows ----


def axolotl_row(tokenizer, shift=0, **more):
    """A conversation and lists about its last tokens: the token itself at 0.6 and a neighbour."""
    said = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A lemon"}]
    text = tokenizer.apply_chat_template(said, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    about = ids[-5 - shift : len(ids) - shift]
    lists = [
        [{"token": f"token_id:{one}", "logprob": -0.5}, {"token": "token_id:9", "logprob": -1.5}]
        for one in about
    ]
    return {"messages": said, "logprobs": lists} | more, ids


def test_axolotls_rows_belong_to_the_last_tokens(tiny_llama, tiny_tokenizer, tmp_path):
    row, ids = axolotl_row(tiny_tokenizer)
    numbers = [[one["logprob"] for one in entries] for entries in row["logprobs"]]
    tokens = [[int(one["token"][9:]) for one in entries] for entries in row["logprobs"]]
    split = row | {"logprobs": numbers, "target_token_ids": tokens}
    for number, told in enumerate((row, split)):
        source = tmp_path / f"{number}.jsonl"
        source.write_text(json.dumps(told))
        record = taken("axolotl", source, tmp_path / f"cache{number}", tiny_llama)[0]
        np.testing.assert_array_equal(record.example.token_ids, ids)
        assert np.flatnonzero(record.example.loss_mask).tolist() == list(
            range(len(ids) - 5, len(ids))
        )
        assert record.first_row == len(ids) - 6
        np.testing.assert_array_equal(record.signals["topk_ids"][:, 0], ids[-5:])
        np.testing.assert_allclose(record.signals["topk_logprobs"], [[-0.5, -1.5]] * 5)
        assert "tail_logprob" not in record.signals


@pytest.mark.parametrize(
    ("shift", "more", "message"),
    [
        (1, {}, r":1: .* of 5 tokens are among the guesses.*tokenizer and template"),
        (0, {"target_logprobs": []}, "prepared by axolotl, which renormalises"),
        (0, {"messages": []}, "no messages and logprobs"),
        (0, {"target_token_ids": [[1]], "logprobs": [[-0.5]] * 5}, "1 lists of ids for 5"),
        (0, {"target_token_ids": [[1]]}, "logprobs.0.0 is .*expected input should be a valid num"),
    ],
)
def test_axolotls_rows_that_cannot_be_right(
    tiny_tokenizer, tiny_llama, tmp_path, shift, more, message
):
    (tmp_path / "rows.jsonl").write_text(json.dumps(axolotl_row(tiny_tokenizer, shift, **more)[0]))
    with pytest.raises(StillroomError, match=message):
        taken("axolotl", tmp_path / "rows.jsonl", tmp_path / "cache", tiny_llama)
    assert not (tmp_path / "cache").exists()
