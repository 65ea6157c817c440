"""One suite for every teacher engine; `reference` is the truth, vLLM runs for real on a CPU."""

import json
import os
import shutil
import warnings
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stillroom.cache_schemas.errors import ConfigError, TeacherError
from stillroom.pipeline.config import Capture, Teacher
from stillroom.pipeline.record import Example, content_id
from stillroom.pipeline.teacher import protocol
from stillroom.pipeline.teacher.facts import model_shape
from stillroom.pipeline.teacher.opening import open_engine
from stillroom.pipeline.teacher.protocol import RejectedExample
from stillroom.pipeline.teacher.vllm import self_test
from stillroom.pipeline.teacher.vllm.engine import requests_for

TABLE = Capture(
    k=16,
    tail_draws=8,
    temperatures=(0.5, 2.0, 4.0),
    moments=True,
    hidden_layers=(1, 2, "final"),
    hidden_stride=3,
)
CONTEXT = 160


def example(length: int, seed: int, masked: int = 0, vocab_size: int = 768) -> Example:
    ids = np.random.default_rng(seed).integers(0, vocab_size, length).astype(np.int32)
    mask = np.arange(length) >= masked
    return Example(content_id(ids, mask), "document", "random", ids, mask)


EXAMPLES = [
    example(40, 1),
    example(60, 2, masked=30),
    example(2, 3),
    example(150, 4, masked=100),
    example(CONTEXT, 5),
    example(17, 6, masked=16),
]


def settings_of(model) -> Teacher:
    """Steps of 64 tokens: longer prompts are read in pieces, and several share a step."""
    arguments = {"max_num_batched_tokens": 64, "max_num_seqs": 4}
    return Teacher(model=str(model), dtype="float32", engine_args=arguments)


@pytest.fixture(scope="module")
def engines(tiny_llama, tiny_qwen3):
    """(name, model) -> an open engine; each is started once.

    Closing any vLLM engine of a process ends the process groups of all of them, so tests that
    start and close one of their own stand below the tests that use these.
    """
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    opened = {}
    for name, (label, model) in product(
        ("reference", "vllm"), {"llama": tiny_llama, "qwen3": tiny_qwen3}.items()
    ):
        opened[name, label] = open_engine(name, settings_of(model), TABLE, max_tokens=CONTEXT)
    yield opened
    for each in opened.values():
        each.close()


NAMES = pytest.mark.parametrize("name", ["reference", "vllm"])
MODELS = pytest.mark.parametrize("model", ["llama", "qwen3"])
pytestmark = pytest.mark.vllm


@NAMES
@MODELS
def test_records_come_in_order_with_every_signal(engines, name, model):
    records = list(engines[name, model].score(EXAMPLES))
    assert [record.example for record in records] == EXAMPLES
    for record in records:
        rows, positions = record.num_rows, record.hidden_positions
        assert record.first_row == record.example.first_row
        assert record.signals["topk_ids"].shape == (rows, 16)
        assert record.signals["lse"].shape == (rows, 4)
        tails = np.exp(record.signals["tail_logprob"].astype(float))
        assert (record.signals["draw_counts"].sum(axis=1) == np.ceil(8 * tails - 1e-4)).all()
        assert positions.tolist() == list(range(record.first_row, record.first_row + rows, 3))
        assert record.signals["hidden.final"].shape == (len(positions), 64)
        mass = np.exp(record.signals["topk_logprobs"]).sum(1) + np.exp(
            record.signals["tail_logprob"]
        )
        np.testing.assert_allclose(mass, 1.0, atol=1e-5)


@NAMES
@MODELS
def test_row_t_is_about_token_t_plus_one(engines, name, model):
    checked = 0
    for record in engines[name, model].score(EXAMPLES):
        said, tokens = record.signals, record.example.token_ids[record.first_row + 1 :]
        for row in np.flatnonzero(said["token_rank"] <= 16):
            column = said["token_rank"][row] - 1
            assert said["topk_ids"][row, column] == tokens[row]
            gap = said["topk_logprobs"][row, column] - said["token_logprob"][row]
            assert abs(gap) <= 1e-6
            checked += 1
    assert checked > 0


@MODELS
def test_vllm_says_what_transformers_says(engines, model):
    truth = list(engines["reference", model].score(EXAMPLES))
    _assert_same(list(engines["vllm", model].score(EXAMPLES)), truth)


def _assert_same(found: list, truth: list) -> None:
    """All rows of all records are judged together where ids at a boundary may fall either way: an
    example may have one row, and then one id would be all of them."""
    assert len(found) == len(truth)
    for name in truth[0].signals:
        actual, expected = (
            np.concatenate([record.signals[name] for record in records])
            for records in (found, truth)
        )
        assert actual.dtype == expected.dtype
        if name.startswith("hidden."):
            for ours, theirs in zip(found, truth):
                gap = np.abs(ours.signals[name] - theirs.signals[name]).max()
                assert gap <= 1e-4 * np.abs(theirs.signals[name]).max()
        elif name.startswith("draw_"):
            assert (actual != expected).any(axis=1).mean() <= 0.1  # a point at a boundary
        elif name == "topk_ids":
            assert (actual != expected).sum() <= 0.01 * actual.size  # ties; the values are the same
        elif name == "token_rank":
            assert (np.abs(actual - expected) <= 1).all()
        elif expected.size:
            assert np.abs(actual - expected).max() <= 1e-4, name


@NAMES
def test_an_answer_does_not_depend_on_what_is_asked_beside_it(engines, name):
    teacher = engines[name, "llama"]
    together = list(teacher.score(EXAMPLES))
    for record in together[::-1]:
        (alone,) = teacher.score([record.example])
        for signal, array in record.signals.items():
            if array.dtype.kind == "f":
                np.testing.assert_allclose(alone.signals[signal], array, atol=2e-4, rtol=1e-4)


@NAMES
def test_hidden_states_at_the_answer_only(engines, name):
    teacher = engines[name, "llama"]
    mask = np.zeros(40, dtype=bool)
    mask[[10, 11, 30]] = True
    asked = replace(EXAMPLES[0], loss_mask=mask)
    table = TABLE.model_copy(update={"hidden_rows": "answer", "hidden_stride": 1})
    assert protocol.hidden_positions(asked, table).tolist() == [9, 10, 29]
    (record,) = teacher.score([asked])
    assert record.first_row == 9


@NAMES
def test_what_cannot_be_answered_is_refused_or_left_empty(engines, name):
    teacher = engines[name, "llama"]
    outside = example(20, 8, vocab_size=800)
    long = example(513, 9)
    nothing = replace(example(5, 10), loss_mask=np.zeros(5, dtype=bool))
    for bad in (outside, long, nothing):
        with pytest.raises(RejectedExample, match=bad.example_id):
            list(teacher.score([EXAMPLES[0], bad]))
    refused = []
    records = list(teacher.score([outside, EXAMPLES[0], long, nothing], refused.append))
    assert [error.example for error in refused] == [outside, long, nothing]
    assert [record.num_rows for record in records] == [0, EXAMPLES[0].num_rows, 0, 0]
    assert set(records[0].signals) == set(records[1].signals)


@NAMES
def test_a_half_read_answer_leaves_the_engine_usable(engines, name):
    teacher = engines[name, "llama"]
    next(iter(teacher.score(EXAMPLES)))
    assert len(list(teacher.score(EXAMPLES[:2]))) == 2


def test_the_self_test_names_both_values(engines):
    vllm = engines["vllm", "llama"]
    asked = vllm._requests

    def wrong(change):
        def signals(example, output):
            return {n: change(n, array) for n, array in asked.signals(example, output).items()}

        return SimpleNamespace(sampling=asked.sampling, signals=signals)

    late = wrong(lambda _, array: np.roll(array, 1, axis=0))
    off = wrong(lambda name, array: array + 0.01 if name == "token_logprob" else array)
    self_test.self_test(vllm._ask_alone, asked, vllm.shape, "float32", 64)
    with pytest.raises(TeacherError, match=r"differ at row \d: hooks say top ids .*\(public API"):
        self_test.self_test(vllm._ask_alone, late, vllm.shape, "float32", 64)
    with pytest.raises(TeacherError, match=r"say token_logprob -\d\S+; expected -\d\S+ \(public"):
        self_test.self_test(vllm._ask_alone, off, vllm.shape, "float32", 64)


def test_a_bound_on_memory_reaches_the_worker(tiny_llama):
    teacher = settings_of(tiny_llama).model_copy(update={"scratch_mib": 3})
    asked = requests_for(TABLE, teacher).engine_arguments()["additional_config"]
    assert asked["stillroom"]["scratch_bytes"] == 3 << 20


def test_another_vllm_gets_the_public_api_and_a_warning(tiny_llama, engines, monkeypatch):
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    table = TABLE.model_copy(update={"hidden_layers": ()})
    asked = EXAMPLES[1]
    with pytest.warns(UserWarning, match=r"0\.33\.1 is not 0\.32\.0.*slower and has no hidden"):
        teacher = open_engine("vllm", settings_of(tiny_llama), table, max_tokens=CONTEXT)
    (found,) = teacher.score([asked])
    teacher.close()
    (truth,) = engines["reference", "llama"].score([asked])
    for name, array in found.signals.items():
        if array.dtype.kind == "f":
            np.testing.assert_allclose(array, truth.signals[name], atol=1e-4, err_msg=name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(TeacherError, match="hidden states cannot be had"):
            open_engine("vllm", settings_of(tiny_llama), TABLE, max_tokens=CONTEXT)


def test_draws_from_the_whole_where_no_id_is_exact(tiny_llama):
    table = Capture(k=0, tail_draws=8)
    said = {}
    for name in ("reference", "vllm"):
        teacher = open_engine(name, settings_of(tiny_llama), table, max_tokens=CONTEXT)
        said[name] = list(teacher.score(EXAMPLES))
        teacher.close()
    _assert_same(said["vllm"], said["reference"])
    for record in said["vllm"] + said["reference"]:
        assert record.signals["topk_ids"].shape == (record.num_rows, 0)
        assert (record.signals["tail_logprob"] == 0).all()
        assert (record.signals["draw_counts"].sum(axis=1) == 8).all()


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_two_ranks_say_what_one_says(tiny_llama, parallel):
    """Rank 0 gathers the logits; a pipeline's last stage gets the first one's hidden layers."""
    teacher = settings_of(tiny_llama)
    arguments = teacher.engine_args | {parallel: 2}
    both = teacher.model_copy(update={"engine_args": arguments})
    said = []
    for name, settings in (("vllm", both), ("reference", teacher)):
        running = open_engine(name, settings, TABLE, max_tokens=CONTEXT)
        said.append(list(running.score(EXAMPLES)))
        running.close()
    _assert_same(*said)


def _with_weights(source, directory, change):
    """A copy of a model with a head of its own and `change` applied to it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        change(model)
    model.save_pretrained(directory)
    return settings_of(directory)


@NAMES
def test_nan_is_named_by_example_and_position(name, tiny_llama, tmp_path):
    def poison(model):
        model.get_input_embeddings().weight[500] = float("nan")

    settings = _with_weights(tiny_llama, tmp_path, poison)
    asked, clean = example(12, 1, masked=3, vocab_size=256), example(12, 2, vocab_size=256)
    tokens = asked.token_ids.copy()
    tokens[7] = 500
    asked = replace(asked, token_ids=tokens)
    teacher = open_engine(name, settings, Capture(k=4), max_tokens=64)
    # Attention multiplies masked positions by zero, which leaves NaN: every row is spoilt.
    with pytest.raises(RejectedExample, match=f"{asked.example_id}.*logits at position 2"):
        list(teacher.score([clean, asked]))
    teacher.close()


def test_the_position_of_bad_logits_is_counted_in_tokens(engines):
    (record,) = engines["reference", "llama"].score([EXAMPLES[1]])
    for signal in ("lse", "token_logprob", "topk_logprobs"):
        said = {key: array.copy() for key, array in record.signals.items()}
        protocol.check_finite(record.example, record.first_row, said)
        said[signal][4] = np.nan
        with pytest.raises(RejectedExample, match=f"logits at position {record.first_row + 4}\\."):
            protocol.check_finite(record.example, record.first_row, said)


def test_a_teacher_that_only_says_nan_does_not_start(tiny_llama, tmp_path):
    def poison(model):
        model.lm_head.weight[500] = float("nan")

    settings = _with_weights(tiny_llama, tmp_path, poison)
    with pytest.raises(TeacherError, match=r"self-test.*NaN or infinite logits"):
        open_engine("vllm", settings, Capture(k=4), max_tokens=64)


@NAMES
def test_requests_beyond_the_model(name, tiny_llama):
    teacher = settings_of(tiny_llama)
    with pytest.raises(ConfigError, match="k = 400 of a vocabulary of 300"):
        protocol.check_request(Capture(k=400), replace(model_shape(teacher), vocab_size=300))
    with pytest.raises(ConfigError, match="hidden layer 4 of a model of 3 blocks"):
        open_engine(name, teacher, Capture(k=4, hidden_layers=(4,)))
    with pytest.raises(ConfigError, match="temperature"):
        open_engine(name, teacher, Capture(k=4, temperatures=(-1.0,)))


@NAMES
@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (shutil.rmtree, "no such directory"),
        (lambda d: (d / "model.safetensors").unlink(), "no weights|cannot"),
        (lambda d: (d / "config.json").unlink(), r"config\.json is missing"),
        (lambda d: (d / "config.json").write_text("{"), r"config\.json"),
        (
            lambda d: (d / "config.json").write_text('{"architectures": ["Nope"]}'),
            r"config\.json cannot be understood",
        ),
    ],
)
def test_directories_that_are_no_teacher(name, tiny_llama, tmp_path, break_it, message):
    directory = tmp_path / "broken"
    shutil.copytree(tiny_llama, directory)
    break_it(directory)
    with pytest.raises(TeacherError, match=message):
        open_engine(name, Teacher(model=str(directory), dtype="float32"), Capture(k=4))


def test_an_architecture_that_vllm_cannot_serve(tiny_llama, tmp_path):
    directory = shutil.copytree(tiny_llama, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"architectures": ["NopeForLM"]}))
    with pytest.raises(TeacherError, match=r"vLLM cannot serve this model \(.*NopeForLM"):
        open_engine("vllm", Teacher(model=str(directory)), Capture(k=4))
