"""vLLM is held against the model's definition before a shard is kept; its failures are messages."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from benchmarks._architecture_zoo import save
from stillroom.cache_schemas.errors import ConfigError, TeacherError
from stillroom.cache_schemas.manifest import DefinitionCheck
from stillroom.pipeline.cache.care.overview import overview
from stillroom.pipeline.cache.care.verification import verify
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.cache.storage.directory import DirectoryStorage
from stillroom.pipeline.capture import job
from stillroom.pipeline.config import Capture, Prepare, Run, Source, Teacher
from stillroom.pipeline.corpus.preparing import prepare
from stillroom.pipeline.record import Example, content_id
from stillroom.pipeline.teacher import definition_check
from stillroom.pipeline.teacher.definition_check import Question, check_definition, choose
from stillroom.pipeline.teacher.opening import open_engine
from stillroom.pipeline.teacher.protocol import OutOfMemory
from stillroom.pipeline.teacher.reference import apart
from stillroom.pipeline.teacher.reference.apart import answers_apart
from stillroom.pipeline.teacher.reference.engine import ReferenceEngine
from stillroom.pipeline.teacher.vllm.failures import step, with_needed

TABLE = Capture(k=16, hidden_layers=(1, 3, "final"), examples_per_shard=4, check="always")


def text(length: int, seed: int | None = None) -> Example:
    ids = (
        np.random.default_rng(length if seed is None else seed)
        .integers(4, 500, length)
        .astype(np.int32)
    )
    mask = np.ones(length, dtype=bool)
    return Example(content_id(ids, mask), "text", "random", ids, mask)


TEXTS = [text(20), text(9), text(150), text(40)]


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory):
    """Soft caps, sliding windows of 32, and blocks that vLLM does not hand out itself."""
    model = save("gemma2", tmp_path_factory.mktemp("zoo") / "model")
    return Teacher(model=str(model), dtype="float32")


class Bent:
    """The reference engine with a fault."""

    def __init__(self, teacher, bend=lambda record: None, dtype="float32"):
        teacher = teacher.model_copy(update={"dtype": dtype})
        self.inner, self.bend, self.closed = open_engine("reference", teacher, TABLE), bend, False

    def score(self, examples, reject=None):
        for record in self.inner.score(examples):
            self.bend(record)
            yield record

    def close(self):
        self.closed = True


def asked(teacher, **more) -> Question:
    table = TABLE.model_copy(update=more)
    return Question(teacher, table, TEXTS, None, sum(len(t.token_ids) for t in TEXTS))


def test_the_corpus_own_lengths_are_compared():
    chosen = choose([*TEXTS, replace(text(60), images=(SimpleNamespace(sha256="a", start=1),))])
    lengths = {name: len(example.token_ids) for name, example in chosen.items()}
    assert lengths == {"shortest": 9, "longest": 150, "with images": 60}


@pytest.fixture
def beside(monkeypatch):
    """The definition in this process, where no vLLM runs: a second, not a process's ten."""

    def answers(teacher, capture, examples, pictures=None, *, placement=None, **_):
        engine = ReferenceEngine(teacher, capture, pictures, placement)
        return list(engine.score(examples))

    monkeypatch.setattr(definition_check, "answers_apart", answers)


@pytest.mark.vllm
def test_vllm_is_compared_and_the_cache_says_so(gemma2):
    engine = open_engine("vllm", gemma2, TABLE, max_tokens=150)
    found = check_definition(engine, asked(gemma2))
    engine.close()
    assert found.done
    assert found.tokens == 159
    assert 0 < found.logprob <= 1e-4
    assert set(found.hidden) == {"hidden.1", "hidden.3", "hidden.final"}
    assert max(found.hidden.values()) <= 1e-4


def _shift(name, by):
    def bend(record):
        record.signals[name] = record.signals[name] + np.float32(by)

    return bend


def _late(record):
    """As if a window held one token more: only what comes after it is otherwise."""
    record.signals["lse"][32:] += np.float32(2e-3)


def _eighth(record):
    record.signals["hidden.final"] = record.signals["hidden.final"] / 8


@pytest.mark.parametrize(
    ("bend", "message"),
    [
        (
            _shift("token_logprob", 1.3e-3),
            r"up to 0\.0013 nats \(limit 0\.0001\) and .* on the shortest text, 9 tokens",
        ),
        (
            _late,
            r"up to 0\.002 nats \(limit 0\.0001\) and .* on the longest text, 150 tokens; expected",
        ),
        (_eighth, r"hidden\.final differs by 0\.875 of its largest value"),
        (_shift("lse", np.nan), r"up to inf nats"),
    ],
)
def test_small_faults_are_found(gemma2, beside, bend, message):
    with pytest.raises(TeacherError, match=message + r".*engine reference"):
        check_definition(Bent(gemma2, bend), asked(gemma2))


def test_half_precision_is_judged_by_the_definitions_own_noise(gemma2, beside):
    half = gemma2.model_copy(update={"dtype": "bfloat16"})
    found = check_definition(Bent(gemma2, dtype="bfloat16"), asked(half))
    assert found.noise == pytest.approx(found.logprob)
    assert found.noise > 1e-3
    with pytest.raises(TeacherError, match="log-probabilities differ"):
        check_definition(Bent(gemma2, _shift("lse", 10 * found.noise), "bfloat16"), asked(half))


SHORT = [text(2 + number % 4, seed=number) for number in range(40)]
"""Titles: 100 rows in all, 64 of which are compared."""


def bent_weights(teacher, directory, factor):
    """A copy of a teacher with one matrix of one block scaled."""
    shutil.copytree(teacher.model, directory)
    tensors = load_file(directory / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.down_proj.weight"))
    tensors[name] = tensors[name] * factor
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return teacher.model_copy(update={"model": str(directory)})


def test_half_precision_on_short_texts_is_no_fault_and_a_fault_is(beside, tmp_path):
    model = str(save("llama", tmp_path / "model"))
    half = Teacher(model=model, dtype="bfloat16")
    question = replace(asked(half, hidden_layers=("final",)), examples=SHORT)
    other_kernels = half.model_copy(update={"attention": "sdpa"})
    found = check_definition(Bent(other_kernels, dtype="bfloat16"), question)
    assert found.done
    assert found.tokens > 64
    wrong = bent_weights(half, tmp_path / "bent", 1.5)
    with pytest.raises(TeacherError, match=r"\(limit .*dtype = \"float32\" under \[teacher\]"):
        check_definition(Bent(wrong, dtype="bfloat16"), question)


def test_another_base_of_rope_is_a_fault_where_texts_are_long_enough_to_show_it(gemma2, beside):
    """In half precision, at the lengths of a question with a few titles."""
    half = gemma2.model_copy(update={"dtype": "bfloat16"})
    question = replace(asked(half), examples=[text(20 + n, seed=n) for n in range(12)])
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}
    wrong = half.model_copy(update={"engine_args": {"hf_overrides": rope}})
    with pytest.raises(TeacherError, match="log-probabilities differ"):
        check_definition(Bent(wrong, dtype="bfloat16"), question)


def test_the_message_names_the_table_that_the_check_is_under(gemma2, beside):
    engine = Bent(gemma2, _shift("token_logprob", 0.1))
    with pytest.raises(TeacherError, match=r'check = "never" under \[items\]'):
        check_definition(engine, replace(asked(gemma2), table="items"))


def test_a_further_text_that_cannot_be_answered_is_left_out(gemma2, beside):
    outside = replace(text(3, seed=99), token_ids=np.full(3, 600, dtype=np.int32))
    question = replace(asked(gemma2), examples=[*SHORT[:4], outside, *SHORT[4:]])
    assert check_definition(Bent(gemma2), question).done


def test_a_model_that_is_too_slow_or_unwanted_says_why(gemma2, beside, monkeypatch):
    assert check_definition(Bent(gemma2), asked(gemma2, check="never")).reason.endswith('"never"')
    monkeypatch.setattr(definition_check, "_products_per_second", lambda: 1.0)
    found = check_definition(Bent(gemma2), asked(gemma2, check="auto"))
    assert (found.done, "it would take some" in found.reason) == (False, True)
    assert check_definition(Bent(gemma2), asked(gemma2, check="always")).done
    unknown = gemma2.model_copy(update={"engine_args": {"kv_cache_dtype": "fp8"}})
    with pytest.raises(TeacherError, match=r"cannot apply kv_cache_dtype.*Set check = \"auto\""):
        check_definition(Bent(gemma2), asked(unknown))


def test_blocks_that_do_not_fit_into_memory_stay_on_disk(gemma2, beside, monkeypatch):
    pytest.importorskip("accelerate")
    monkeypatch.setattr(definition_check, "_free_bytes", lambda: 3e5)
    found = check_definition(Bent(gemma2), asked(gemma2))
    assert found.done
    assert found.logprob <= 1e-5


@pytest.fixture
def run(tiny_llama, tmp_path):
    """A prepared run."""
    source = Source(name="help", kind="pydoc_topics", limit=1)
    settings = Prepare(source=(source,), window=64, heldout=0.0)
    prepare(settings, str(tiny_llama), tmp_path / "corpus")
    teacher = Teacher(model=str(tiny_llama), dtype="float32")
    return Run(name="run", directory=str(tmp_path), teacher=teacher, capture=TABLE)


def test_a_process_apart_says_the_same_refuses_and_is_stopped_in_time(gemma2):
    here = list(ReferenceEngine(gemma2, TABLE).score(TEXTS[:2]))
    for mine, theirs in zip(answers_apart(gemma2, TABLE, TEXTS[:2]), here, strict=True):
        assert mine.example is theirs.example
        assert (mine.hidden_positions == theirs.hidden_positions).all()
        assert mine.signals.keys() == theirs.signals.keys()
        for name, array in theirs.signals.items():
            np.testing.assert_array_equal(mine.signals[name], array)
    outside = replace(text(9), token_ids=np.full(9, 600, dtype=np.int32))
    with pytest.raises(TeacherError, match="token id 600 is outside"):
        answers_apart(gemma2, TABLE, [outside])
    with pytest.raises(TimeoutError, match="not done after 0 s"):
        answers_apart(gemma2, TABLE, TEXTS, seconds=0.01)


def _with_engine(monkeypatch, engine):
    monkeypatch.setattr(job, "open_named_engine", lambda *_, **__: engine)


def test_a_capture_keeps_nothing_where_they_differ(run, beside, monkeypatch):
    engine = Bent(run.teacher, _shift("token_logprob", 0.01))
    _with_engine(monkeypatch, engine)
    with pytest.raises(TeacherError, match=r"differ by up to 0\.01 nats.*Nothing was captured"):
        job.capture(run, engine="vllm")
    assert engine.closed
    assert not run.path("cache").exists()
    other = run.model_copy(update={"capture": TABLE.model_copy(update={"examples_per_shard": 8})})
    assert job.capture(other, engine="reference") is not None


def test_the_result_is_in_the_manifest_and_asked_for_once(run, beside, monkeypatch):
    _with_engine(monkeypatch, Bent(run.teacher))
    manifest = job.capture(run, engine="vllm")
    assert manifest is not None
    found = manifest.definition
    assert isinstance(found, DefinitionCheck)
    assert found.done
    assert found.logprob == 0
    assert TeacherCache.open(str(run.path("cache"))).manifest.definition == found
    assert overview(DirectoryStorage(run.path("cache"))).definition == found
    assert verify(DirectoryStorage(run.path("cache"))).problems == []
    monkeypatch.setattr(job, "check_definition", None)
    assert job.capture(run, engine="vllm") == manifest


def test_failures_in_any_step_are_messages():
    def failing(error):
        def raises():
            raise error

        engine = SimpleNamespace(step=raises)
        return SimpleNamespace(llm_engine=engine, model_config=SimpleNamespace(model="here"))

    with pytest.raises(TeacherError, match=r"here: vLLM failed .*\(GDN attention requires BF16\)"):
        step(failing(RuntimeError("GDN attention requires BF16\nat some line")))
    with pytest.raises(TeacherError, match=r"\(AttributeError: no such thing\)"):
        step(failing(AttributeError("no such thing")))
    with pytest.raises(OutOfMemory):
        step(failing(RuntimeError("CUDA out of memory")))


def test_a_persons_arguments_win_or_we_say_what_we_need():
    def asks(**engine_args):
        return Teacher(model="m", engine_args=engine_args)

    ours = {"enable_prefix_caching": False, "additional_config": {"a": 1}}
    theirs = asks(additional_config={"b": 2})
    made = with_needed(theirs, dict(theirs.engine_args), ours)
    assert made["additional_config"] == {"a": 1, "b": 2}
    with pytest.raises(ConfigError, match=r"enable_prefix_caching = True; expected False: a pos"):
        with_needed(asks(enable_prefix_caching=True), {}, ours)


@pytest.mark.vllm
def test_longrope_is_refused_with_the_window_that_works(tmp_path):
    model = save("phi3-longrope", tmp_path / "model")
    teacher = Teacher(model=str(model), dtype="float32")
    engine = open_engine("vllm", teacher, TABLE, max_tokens=150)
    with pytest.raises(TeacherError, match=r"nats .*on the shortest text.*\[prepare\] window < 64"):
        check_definition(engine, asked(teacher))
    engine.close()


def test_a_process_apart_ends_with_whoever_asked_and_leaves_no_files(gemma2, tmp_path):
    (tmp_path / "question").mkdir()
    (tmp_path / "blocks").mkdir()
    placement = {"offload_folder": str(tmp_path / "blocks")}
    apart._ask(tmp_path / "question", gemma2, TABLE, TEXTS, None, placement)
    ended, held = os.pipe()
    os.close(held)  # as it is closed when a process is killed
    command = [sys.executable, "-m", apart.__name__, str(tmp_path / "question")]
    done = subprocess.run(command, env=apart._environment(False), stdin=ended, timeout=240)
    os.close(ended)
    assert done.returncode == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("noted", "check", "compared"),
    [
        (None, "auto", True),
        (DefinitionCheck(done=True), "always", False),
        (DefinitionCheck(done=False), "auto", False),
        (DefinitionCheck(done=False), "always", True),
    ],
)
def test_what_was_not_compared_is_when_that_is_asked_for(
    noted, check, compared, gemma2, plan, tmp_path, monkeypatch
):
    found = DefinitionCheck(done=True, tokens=7)
    monkeypatch.setattr(job, "check_definition", lambda *_: found)
    writer = job.CacheWriter.open(tmp_path / "cache", plan)
    if noted:
        writer.note_definition(noted)
    question = asked(gemma2, check=check)
    job.compare(writer, "reference", SimpleNamespace(), question)
    assert writer.definition == noted
    job.compare(writer, "vllm", SimpleNamespace(), question)
    assert writer.definition == (found if compared else noted)
