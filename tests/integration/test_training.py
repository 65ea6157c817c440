"""Stage two from real caches: it learns, resumes to the bit, and needs no teacher."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from stillroom.cache_schemas.errors import ConfigError, PlanMismatch, StudentError
from stillroom.pipeline.config import parse
from stillroom.pipeline.student.model import initial_student
from stillroom.pipeline.training.metrics import read_metrics
from stillroom.pipeline.training.trainer import Interrupted, train
from tests import memory_cache, tiny_models

STEPS = 8


@pytest.fixture(scope="module")
def teacher(deep_llama):
    return deep_llama


@pytest.fixture(scope="module")
def cache(teacher):
    texts = memory_cache.examples(40)
    return memory_cache.captured(teacher, texts, temperatures=(1.0, 2.0), hidden_layers=("final",))


def make_run(directory, teacher, **changes):
    """A run of `STEPS` steps; `changes` go into [train], `objective` replaces the objectives."""
    objective = changes.pop("objective", [{"name": "forward_kl", "options": {"ce_weight": 0.1}}])
    settings = {
        "steps": STEPS,
        "batch_tokens": 96,
        "accumulate": 2,
        "checkpoint_every": 3,
        "learning_rate": 3e-3,
        "workers": 0,
    }
    document = {
        "name": "test",
        "directory": str(directory),
        "teacher": {"model": str(teacher), "dtype": "float32"},
        "student": {"keep_every": 3},
        "objective": objective,
        "train": settings | changes,
    }
    return parse(document, "test")


def losses(run) -> list[float]:
    return [line["loss"] for line in read_metrics(run.path())]


def weights_digest(run) -> str:
    return hashlib.sha256(run.path("student", "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, teacher, cache):
    run = make_run(tmp_path_factory.mktemp("whole"), teacher)
    train(run, caches={"": cache})
    return run


def test_the_loss_falls_and_the_result_is_a_plain_model(uninterrupted):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    values = losses(uninterrupted)
    assert len(values) == STEPS
    assert values[-1] < 0.8 * values[0]
    model = AutoModelForCausalLM.from_pretrained(uninterrupted.path("student"))
    tokenizer = AutoTokenizer.from_pretrained(uninterrupted.path("student"))
    assert model.config.num_hidden_layers == 2
    logits = model(**tokenizer("a few words", return_tensors="pt")).logits
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("stop_after", [1, 4, 7])
@pytest.mark.parametrize("background", [False, True])
def test_a_stopped_run_goes_on_to_the_same_bits(
    tmp_path, teacher, cache, uninterrupted, stop_after, background
):
    run = make_run(tmp_path, teacher, async_checkpoint=background)
    asked = iter(range(1000))
    with pytest.raises(Interrupted, match=f"stopped after step {stop_after} of {STEPS}") as caught:
        train(run, caches={"": cache}, stop=lambda: next(asked) >= stop_after)
    assert caught.value.exit_code == 3
    result = train(run, caches={"": cache})
    assert losses(run) == losses(uninterrupted)
    assert weights_digest(run) == weights_digest(uninterrupted)
    whole = train(uninterrupted, caches={"": cache})
    assert (result.tokens, result.final_loss) == (whole.tokens, whole.final_loss)


def test_a_run_killed_before_its_export_is_told_whole(tmp_path, teacher, cache, uninterrupted):
    shutil.copytree(uninterrupted.path(), tmp_path / "run")
    run = make_run(tmp_path / "run", teacher)
    shutil.rmtree(run.path("student"))
    run.path("train.json").unlink()
    result = train(run, caches={"": cache})
    whole = train(uninterrupted, caches={"": cache})
    assert (result.tokens, result.final_loss) == (whole.tokens, whole.final_loss)
    assert weights_digest(run) == weights_digest(uninterrupted)


CHILD = """
import sys
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.training.trainer import train
from tests.integration.test_training import make_run

run = make_run(sys.argv[1], sys.argv[2], cache=sys.argv[3])
train(run, on_progress=lambda now: print(now.step, flush=True))
"""


def test_killed_at_random_moments_gives_the_same_losses(tmp_path, teacher, cache, uninterrupted):
    stored = cache.write(tmp_path / "cache")
    random = np.random.default_rng(0)
    run = make_run(tmp_path / "run", teacher)
    arguments = [sys.executable, "-c", CHILD, str(run.path()), str(teacher), str(stored)]
    for _ in range(4):
        child = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(int(random.integers(1, 4))):
            child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        child.communicate()
    finished = subprocess.run(arguments, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert losses(run) == losses(uninterrupted)
    assert weights_digest(run) == weights_digest(uninterrupted)


def test_training_again_returns_what_is_finished(uninterrupted, cache):
    before = weights_digest(uninterrupted)
    result = train(uninterrupted, caches={"": cache}, stop=lambda: pytest.fail("trained again"))
    assert result.seconds == 0
    assert result.final_loss == losses(uninterrupted)[-1]
    assert weights_digest(uninterrupted) == before


def test_the_teacher_may_be_gone(tmp_path, teacher, cache, uninterrupted):
    moved = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    run = make_run(tmp_path / "run", moved)
    with pytest.raises(Interrupted):
        train(run, caches={"": cache}, stop=lambda: True)
    shutil.rmtree(moved)
    train(run, caches={"": cache})
    assert losses(run) == losses(uninterrupted)


def test_only_the_newest_checkpoints_stay(uninterrupted):
    kept = sorted(path.name for path in uninterrupted.path("checkpoints").iterdir())
    assert kept == ["step-00000006", "step-00000008"]


def test_a_changed_run_is_refused_by_name(tmp_path, teacher, cache):
    with pytest.raises(Interrupted):
        train(make_run(tmp_path, teacher), caches={"": cache}, stop=lambda: True)
    with pytest.raises(PlanMismatch, match=r"train\.learning_rate = 0\.003; expected 0\.1"):
        train(make_run(tmp_path, teacher, learning_rate=0.1), caches={"": cache})
    more = [{"name": "forward_kl"}]
    with pytest.raises(PlanMismatch, match=r"objective\[0\].options"):
        train(make_run(tmp_path, teacher, objective=more), caches={"": cache})


def test_a_loss_that_is_not_finite_names_its_examples(tmp_path, teacher, cache):
    run = make_run(tmp_path, teacher, learning_rate=1e25, clip=0, warmup=0, checkpoint_every=1)
    with pytest.raises(StudentError, match="not finite") as caught:
        train(run, caches={"": cache})
    named = caught.value.where.removeprefix("examples ").split(", ")
    assert set(named) <= {record.example.example_id for record in cache.records}
    kept = run.path("checkpoints")
    states = [json.loads((path / "state.json").read_text()) for path in kept.iterdir()]
    assert states
    assert not run.path("student").exists()


def test_a_damaged_checkpoint_says_so(tmp_path, teacher, cache):
    run = make_run(tmp_path, teacher)
    asked = iter(range(1000))
    with pytest.raises(Interrupted):
        train(run, caches={"": cache}, stop=lambda: next(asked) >= 3)
    (shard,) = run.path("checkpoints", "step-00000003").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(StudentError, match="step-00000003: cannot be read"):
        train(run, caches={"": cache})


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"name": "forward_lk"}, "unknown objective 'forward_lk'.*Did you mean 'forward_kl'"),
        (
            {"name": "forward_kl", "options": {"temprature": 2.0}},
            "unknown key 'temprature'. Did you mean 'temperature'",
        ),
        (
            {"name": "forward_kl", "options": {"temperature": 3.0}},
            "temperature 3 is not in the cache; expected one of 1, 2",
        ),
        (
            {"name": "forward_kl", "options": {"tail": "sampled"}},
            "needs signal 'draw_ids'.*topk_ids, topk_logprobs",
        ),
        ({"name": "forward_kl", "cache": "other"}, r"no cache 'other'.*train\.caches"),
    ],
)
def test_what_the_cache_lacks_is_refused_before_the_first_step(
    tmp_path, teacher, cache, objective, message
):
    run = make_run(tmp_path, teacher, objective=[objective])
    with pytest.raises((ConfigError, StudentError), match=message) as caught:
        train(run, caches={"": cache})
    assert caught.value.exit_code == 2
    assert not run.path("checkpoints").exists()


def test_another_tokenizer_is_refused(tmp_path, cache, teacher):
    other = tiny_models.save_llama(tmp_path / "other", vocab_size=700)
    run = make_run(tmp_path / "run", other)
    initial_student(run.student, run.teacher, run.path("student-initial"))
    run = run.model_copy(update={"teacher": None})
    with pytest.raises(StudentError, match=r"tokenizer .* is .*expected.*projection"):
        train(run, caches={"": cache})
