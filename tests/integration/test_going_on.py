"""What a person expects of a trainer: more steps, the best student, one process, plain messages."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from huggingface_hub import EvalResult, ModelCard
from safetensors.torch import load_file, save_file

from stillroom.cache_schemas.errors import (
    ConfigError,
    PlanMismatch,
    StillroomError,
    StudentError,
)
from stillroom.pipeline.config.training import Train
from stillroom.pipeline.student.loading import load
from stillroom.pipeline.student.places import plain_model
from stillroom.pipeline.training import checkpoint, metrics, parallel
from stillroom.pipeline.training.card import add_results
from stillroom.pipeline.training.metrics import read_metrics
from stillroom.pipeline.training.optimization import rate
from stillroom.pipeline.training.parallel import ALONE, Parallel
from stillroom.pipeline.training.run import resolved
from stillroom.pipeline.training.trainer import Interrupted, train
from stillroom.stages import __main__ as shell
from tests import memory_cache, tiny_models
from tests.integration.test_training import losses, make_run, weights_digest


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_models.save_llama(tmp_path_factory.mktemp("teacher") / "model", num_layers=3)


@pytest.fixture(scope="module")
def cache(teacher):
    return memory_cache.captured(teacher, memory_cache.examples(12))


@pytest.fixture(scope="module")
def heldout(teacher, tmp_path_factory):
    captured = memory_cache.captured(teacher, memory_cache.examples(6, seed=4))
    return str(captured.write(tmp_path_factory.mktemp("heldout") / "cache"))


STEADY = {"schedule": "constant", "warmup": 0.0, "checkpoint_every": 4}


def test_a_finished_run_goes_on_for_more_steps(tmp_path, teacher, cache):
    """With a constant rate the longer run is the run that was long from the start."""
    whole = make_run(tmp_path / "whole", teacher, steps=6, **STEADY)
    train(whole, caches={"": cache})
    short = make_run(tmp_path / "more", teacher, steps=3, **STEADY)
    assert train(short, caches={"": cache}).steps == 3
    more = make_run(tmp_path / "more", teacher, steps=6, **STEADY)
    assert train(more, caches={"": cache}).steps == 6
    assert losses(more) == losses(whole)
    assert weights_digest(more) == weights_digest(whole)
    assert train(more, caches={"": cache}).seconds == 0


def test_the_card_of_a_student_that_goes_on(tmp_path, teacher, cache):
    """Figures of the earlier student are not the later one's; what a person wrote is theirs."""
    run = make_run(tmp_path, teacher, steps=1)
    train(run, caches={"": cache})
    told = {"dataset_name": "text", "dataset_type": "text", "metric_type": "acc"}
    add_results(run, [EvalResult(task_type="text-generation", metric_value=0.25, **told)])
    path = run.path("student", "README.md")
    path.write_text(path.read_text() + "\nWhat I think of it.\n")
    train(make_run(tmp_path, teacher, steps=3), caches={"": cache})
    card = ModelCard.load(path)
    assert "What I think of it." in card.text
    assert "| steps | 3, " in card.text
    assert "0.25" not in path.read_text()
    assert card.data.eval_results is None
    path.write_text("---\nfoo: [1\n---\nmine")
    with pytest.raises(StillroomError, match="the card cannot be read"):
        train(make_run(tmp_path, teacher, steps=4), caches={"": cache})


def test_the_rate_follows_the_new_number_of_steps_from_there(tmp_path, teacher, cache):
    train(make_run(tmp_path, teacher, steps=2), caches={"": cache})
    more = make_run(tmp_path, teacher, steps=4)
    train(more, caches={"": cache})
    short, long = make_run(tmp_path, teacher, steps=2).train, more.train
    wanted = [rate(short, 0), rate(short, 1), rate(long, 2), rate(long, 3)]
    assert [line["learning_rate"] for line in read_metrics(more.path())] == wanted


def test_steps_are_not_taken_back(tmp_path, teacher, cache):
    train(make_run(tmp_path, teacher, steps=3, **STEADY), caches={"": cache})
    fewer = make_run(tmp_path, teacher, steps=2, **STEADY)
    with pytest.raises(ConfigError, match="steps = 2 of a run that has taken 3") as caught:
        train(fewer, caches={"": cache})
    assert "steps = 3 or more" in caught.value.remedy
    train(make_run(tmp_path, teacher, steps=3, **STEADY), caches={"": cache})


def test_a_run_whose_checkpoints_are_gone_does_not_start_again(tmp_path, teacher, cache):
    run = make_run(tmp_path / "run", teacher, steps=2, **STEADY)
    result = train(run, caches={"": cache})
    shutil.rmtree(run.path("checkpoints"))
    more = make_run(tmp_path / "run", teacher, steps=3, **STEADY)
    with pytest.raises(StudentError, match="is at step 2, and its checkpoints are gone") as caught:
        train(more, caches={"": cache})
    assert f"model = '{result.student}'" in caught.value.remedy
    shutil.rmtree(result.student)
    with pytest.raises(
        StudentError, match=r"Its student is gone too: delete .*train.json"
    ) as caught:
        train(more, caches={"": cache})
    run.path("train.json").unlink()
    assert train(more, caches={"": cache}).steps == 3


@pytest.mark.parametrize("move", [shutil.copytree, shutil.move], ids=["copied", "moved"])
def test_a_run_elsewhere_has_a_student_of_its_own(tmp_path, teacher, cache, move):
    lora = {"lora": {"rank": 2, "export": "adapter"}}
    train(make_run(tmp_path / "first", teacher, steps=1, **lora), caches={"": cache})
    move(tmp_path / "first", tmp_path / "second")
    run = make_run(tmp_path / "second", teacher, steps=1, **lora)
    result = train(run, caches={"": cache}, stop=lambda: pytest.fail("again"))
    assert (result.student, result.initial) == (
        str(run.path("student")),
        str(run.path("student-initial")),
    )
    assert plain_model(result.student) == result.initial
    shutil.rmtree(tmp_path / "first", ignore_errors=True)
    load(result.student)
    # What a person wrote there is theirs.
    config = run.path("student", "adapter_config.json")
    told = json.loads(config.read_text()) | {"base_model_name_or_path": "person/published"}
    config.write_text(json.dumps(told))
    train(run, caches={"": cache})
    assert plain_model(result.student) == "person/published"
    shutil.rmtree(run.path("checkpoints"))
    with pytest.raises(StudentError, match=f"model = '{run.path('student')}'"):
        train(make_run(tmp_path / "second", teacher, steps=2, **lora), caches={"": cache})


BEST = {"evaluate_every": 1, "keep_best": "1.forward_kl", "keep_last": 1}


@pytest.fixture(scope="module")
def overshooting(tmp_path_factory, teacher, cache, heldout):
    """A rate that makes the student better at first and then worse."""
    run = make_run(
        tmp_path_factory.mktemp("best"),
        teacher,
        steps=8,
        heldout_cache=heldout,
        learning_rate=0.02,
        clip=0,
        **STEADY,
        **BEST,
    )
    result = train(run, caches={"": cache})
    return run, result


def test_the_best_student_is_exported(overshooting):
    run, result = overshooting
    measured = [line["heldout/1.forward_kl"] for line in read_metrics(run.path())]
    best = min(range(len(measured)), key=measured.__getitem__) + 1
    assert result.best_step == best < 8
    exported = load_file(run.path("student", "model.safetensors"))
    (kept,) = run.path("checkpoints", f"step-{best:08d}").glob("*.safetensors")
    stored = load_file(kept)
    for name, tensor in exported.items():
        if f"weight.model.{name}" in stored:
            assert torch.equal(stored[f"weight.model.{name}"], tensor), name


def test_patience_ends_a_run_and_it_stays_ended(tmp_path, teacher, cache, heldout, overshooting):
    run = make_run(
        tmp_path,
        teacher,
        steps=8,
        heldout_cache=heldout,
        learning_rate=0.02,
        clip=0,
        patience=1,
        **STEADY,
        **BEST,
    )
    notes = []
    result = train(run, caches={"": cache}, on_note=notes.append)
    measured = [line["heldout/1.forward_kl"] for line in read_metrics(overshooting[0].path())]
    first = next(i for i in range(1, 8) if measured[i] >= min(measured[:i])) + 1
    assert (result.steps, result.best_step) == (first, first - 1)
    assert any("stopped" in note for note in notes)
    notes.clear()
    again = train(run, caches={"": cache}, on_note=notes.append, stop=lambda: pytest.fail("again"))
    assert any(f"stopped at step {first} of 8" in note for note in notes)
    assert (again.steps, again.best_step) == (result.steps, result.best_step)
    changes = run.train.model_dump(mode="json") | {"export_dtype": "bfloat16"}
    narrow = train(make_run(tmp_path, teacher, **changes), caches={"": cache})
    assert (narrow.steps, narrow.best_step) == (result.steps, result.best_step)
    kept = load_file(run.path("student", "model.safetensors"))
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16}


def test_more_patience_goes_on_where_less_has_stopped(
    tmp_path, teacher, cache, heldout, overshooting
):
    """The longer run is the one that was patient from the start."""
    shared = (
        {"steps": 8, "heldout_cache": heldout, "learning_rate": 0.02, "clip": 0} | STEADY | BEST
    )
    weary = train(make_run(tmp_path, teacher, patience=1, **shared), caches={"": cache})
    assert weary.steps < 8
    notes = []
    longer = make_run(tmp_path, teacher, patience=1, **shared | {"steps": 9})
    assert train(longer, caches={"": cache}, on_note=notes.append).steps == weary.steps
    (told,) = [note for note in notes if "stopped" in note]
    assert f"stopped at step {weary.steps} of 9 (patience = 1; with more, or 0, it goes on)" in told
    patient = make_run(tmp_path, teacher, patience=8, **shared)
    assert train(patient, caches={"": cache}).steps == 8
    assert losses(patient) == losses(overshooting[0])
    assert weights_digest(patient) == weights_digest(overshooting[0])
    fewer = make_run(tmp_path, teacher, patience=7, **shared)  # 8 steps were taken
    assert train(fewer, caches={"": cache}, stop=lambda: pytest.fail("again")).seconds == 0


def test_a_stopped_run_remembers_its_best(tmp_path, teacher, cache, heldout, overshooting):
    whole, result = overshooting
    changes = whole.train.model_dump(mode="json") | {"heldout_cache": heldout}
    run = make_run(tmp_path, teacher, **changes)
    asked = iter(range(100))
    with pytest.raises(Interrupted):
        train(run, caches={"": cache}, stop=lambda: next(asked) >= 5)
    assert train(run, caches={"": cache}).best_step == result.best_step
    assert weights_digest(run) == weights_digest(whole)


@pytest.fixture
def without_its_best(tmp_path, overshooting):
    """A copy of that run whose student is to be written again; the best step's checkpoint."""
    whole, result = overshooting
    shutil.copytree(whole.path(), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "student")
    return tmp_path / "run", tmp_path / "run" / "checkpoints" / f"step-{result.best_step:08d}"


def overshooting_again(directory, whole, **changes):
    settings = whole.train.model_dump(mode="json") | changes
    return make_run(directory, whole.teacher.model, **settings)


@pytest.mark.parametrize("lost", ["damaged", "deleted"])
def test_a_lost_best_is_told_with_what_works(cache, overshooting, without_its_best, lost):
    whole, before = overshooting
    directory, best = without_its_best
    (weights,) = best.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-50])
    if lost == "deleted":
        shutil.rmtree(best)
    same = overshooting_again(directory, whole)
    message = {"damaged": "cannot be read", "deleted": "whose checkpoint is gone"}[lost]
    with pytest.raises(StudentError, match=rf"{best}.*of step {before.best_step}.*{message}") as no:
        train(same, caches={"": cache})
    begin = {"damaged": "Delete this checkpoint and set", "deleted": "Set"}[lost]
    assert no.value.remedy.startswith(f"{begin} steps above 8 ")
    assert "or leave keep_best out to have the last step's student" in no.value.remedy
    # Both ways that it names.
    plain = overshooting_again(directory, whole, keep_best="")
    assert train(plain, caches={"": cache}).best_step == 0
    shutil.rmtree(best, ignore_errors=True)
    notes = []
    longer = overshooting_again(directory, whole, steps=10)
    result = train(longer, caches={"": cache}, on_note=notes.append)
    measured = {line["step"]: line["heldout/1.forward_kl"] for line in read_metrics(longer.path())}
    assert result.best_step == min((9, 10), key=measured.__getitem__)
    (told,) = [note for note in notes if "is gone" in note]
    assert told.endswith("whose checkpoint is gone: compared from step 8 on")


def test_a_run_that_ended_early_goes_on_without_its_best(tmp_path, teacher, cache, heldout):
    shared = {"heldout_cache": heldout, "learning_rate": 0.02, "clip": 0} | STEADY | BEST
    run = make_run(tmp_path, teacher, steps=8, patience=1, **shared)
    first = train(run, caches={"": cache})
    assert first.steps < 8
    shutil.rmtree(run.path("student"))
    shutil.rmtree(run.path("checkpoints", f"step-{first.best_step:08d}"))
    notes = []
    again = train(run, caches={"": cache}, on_note=notes.append)
    assert again.best_step > first.steps
    assert any(f"gone: compared from step {first.steps} on" in note for note in notes)


def test_a_measurement_that_is_no_number_is_never_the_best():
    nan = float("nan")
    first = checkpoint.Best(of="it").after(nan, 1)
    assert (first.value, first.step, first.since) == (None, 0, 1)
    best = first.after(0.5, 2)
    assert (best.value, best.step, best.since) == (0.5, 2, 0)
    assert best.after(nan, 3) == replace(best, since=1)
    assert best.after(nan, 3).after(0.4, 4).step == 4
    of_before = checkpoint.Best(nan, 1, of="it")
    assert of_before.after(0.5, 2).step == 2


def test_a_checkpoint_that_is_not_there(tmp_path):
    kept = checkpoint.Checkpoints(tmp_path, ALONE, keep_last=1, background=False)
    with pytest.raises(StudentError, match="step-00000003: there is no such checkpoint"):
        kept.load(kept.of_step(3), {})


@pytest.mark.parametrize("key", ["keep_best", "heldout_cache"])
def test_bests_of_two_measures_are_not_compared(tmp_path, teacher, cache, heldout, key):
    """Step 1 is better by its own measure than any later one by the other."""
    other = memory_cache.captured(teacher, memory_cache.examples(4, seed=9))
    place = str(other.write(tmp_path / "other"))
    hard = "2.cross_entropy"  # above any KL here
    first, second = {
        "keep_best": ({"keep_best": "1.forward_kl"}, {"keep_best": hard}),
        "heldout_cache": ({"heldout_cache": heldout}, {"heldout_cache": place}),
    }[key]
    lines = [{"name": "forward_kl"}, {"name": "cross_entropy"}]
    shared = {"objective": lines, "heldout_cache": heldout, **BEST, **STEADY}
    train(make_run(tmp_path / "run", teacher, **shared | first, steps=3), caches={"": cache})
    notes = []
    longer = make_run(tmp_path / "run", teacher, **shared | second, steps=6)
    result = train(longer, caches={"": cache}, on_note=notes.append)
    measure = "heldout/" + second.get("keep_best", "1.forward_kl")
    measured = {line["step"]: line[measure] for line in read_metrics(longer.path())}
    assert result.best_step == min((4, 5, 6), key=measured.__getitem__)
    assert any("another measure now: compared from step 3 on" in note for note in notes)


def test_a_best_that_was_never_measured_is_not_the_last(tmp_path, teacher, cache, heldout):
    shared = STEADY | {"heldout_cache": heldout, "evaluate_every": 1}
    train(make_run(tmp_path, teacher, steps=2, **shared), caches={"": cache})
    chosen = shared | {"keep_best": "1.forward_kl"}
    with pytest.raises(ConfigError, match=r"a run whose 2 steps were taken without it") as caught:
        train(make_run(tmp_path, teacher, steps=2, **chosen), caches={"": cache})
    assert "set steps higher" in caught.value.remedy
    best = train(make_run(tmp_path, teacher, steps=4, **chosen), caches={"": cache})
    assert best.best_step in (3, 4)
    # Without the key the student is the last step's again.
    assert train(make_run(tmp_path, teacher, steps=4, **shared), caches={"": cache}).best_step == 0


def test_checkpoints_of_before_go_on(tmp_path, teacher, cache):
    """State and identity as they were written before attention, kernel and steps left them."""
    whole = make_run(tmp_path / "whole", teacher, steps=4, **STEADY)
    train(whole, caches={"": cache})
    run = make_run(tmp_path / "old", teacher, steps=4, **STEADY | {"checkpoint_every": 2})
    asked = iter(range(100))
    with pytest.raises(Interrupted):
        train(run, caches={"": cache}, stop=lambda: next(asked) >= 2)
    (state,) = run.path("checkpoints").glob("*/state.json")
    facts = json.loads(state.read_text())
    later = ("packing", "load_balancing", "initial student's config")
    facts["identity"] = {k: v for k, v in facts["identity"].items() if k not in later}
    del facts["best"]
    old = {"steps": 4, "attention": "sdpa", "kernel": "chunked"}
    facts["identity"] |= {f"train.{key}": value for key, value in old.items()}
    state.write_text(json.dumps(facts))
    train(run, caches={"": cache})
    assert weights_digest(run) == weights_digest(whole)
    with pytest.raises(PlanMismatch, match=r"train.precision = 'float32'; expected 'bfloat16'"):
        train(make_run(run.path(), teacher, precision="bfloat16", steps=4), caches={"": cache})


LORA = {"lora": {"rank": 2}}


@pytest.mark.parametrize("kept", [LORA, {"freeze": ["*embed_tokens*"]}, {}], ids=str)
@pytest.mark.parametrize("done", [False, True])
def test_an_initial_student_that_was_changed_by_hand(tmp_path, teacher, cache, kept, done):
    """What no checkpoint holds is read from it again."""
    run = make_run(tmp_path, teacher, steps=4, **STEADY | {"checkpoint_every": 2} | kept)
    asked = iter(range(100))
    if done:
        train(run, caches={"": cache})
    else:
        with pytest.raises(Interrupted):
            train(run, caches={"": cache}, stop=lambda: next(asked) >= 2)
    path = run.path("student-initial", "model.safetensors")
    as_made = path.read_bytes()
    weights = load_file(path)
    save_file({name: 1.5 * weight for name, weight in weights.items()}, path, {"format": "pt"})
    if kept:
        with pytest.raises(PlanMismatch, match="was trained with initial student's weights"):
            train(run, caches={"": cache})
    path.write_bytes(as_made)
    config = run.path("student-initial", "config.json")
    facts = json.loads(config.read_text())
    config.write_text(json.dumps(facts | {"rms_norm_eps": 1e-3}))
    with pytest.raises(PlanMismatch, match="was trained with initial student's config"):
        train(run, caches={"": cache})
    config.write_text(json.dumps(facts | {"transformers_version": "0"}))  # says nothing of answers
    assert train(run, caches={"": cache}).steps == 4


HOLDER = """
import sys
from pathlib import Path
from stillroom.pipeline.training.lock import exclusive
from stillroom.pipeline.training.parallel import Parallel
with exclusive(Path(sys.argv[1]), Parallel.start()):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_second_process_is_refused(tmp_path, teacher, cache, capfd):
    run = make_run(tmp_path, teacher, steps=1)
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    holder = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(StudentError, match="another process is training here") as caught:
        train(run, caches={"": cache})
    assert "Wait for it" in caught.value.remedy
    file = tmp_path / "run.toml"
    file.write_text(
        f'name = "test"\ndirectory = "{tmp_path}"\n[student]\n[teacher]\nmodel = "{teacher}"\n'
    )
    assert shell.run(["student", str(file)]) == 2
    assert "or makes its student" in capfd.readouterr().err
    holder.communicate("\n")
    train(run, caches={"": cache})


def test_a_full_disk_is_a_message_and_the_run_goes_on(tmp_path, teacher, cache, monkeypatch):
    from torch.distributed.checkpoint.api import CheckpointException

    def full(*_args, **_kwargs):
        raise CheckpointException("save", {0: (OSError(28, "No space left on device"), None)})

    run = make_run(tmp_path, teacher, steps=2, checkpoint_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        with pytest.raises(StudentError, match="No space left on device") as caught:
            train(run, caches={"": cache})
    assert "run the same command again" in caught.value.remedy
    assert train(run, caches={"": cache}).steps == 2


@pytest.mark.parametrize(
    ("told", "message", "remedy"),
    [
        ({"SLURM_STEP_NUM_TASKS": "4"}, "srun started 4 tasks", {"WORLD_SIZE": "1"}),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE = 2 without RANK", {"WORLD_SIZE": "1"}),
    ],
)
def test_processes_that_do_not_know_each_other_are_noticed(monkeypatch, told, message, remedy):
    monkeypatch.setattr(parallel.os, "environ", dict(told))
    with pytest.raises(ConfigError, match=message):
        Parallel.start()
    monkeypatch.setattr(parallel.os, "environ", told | remedy)
    assert Parallel.start().world_size == 1


@pytest.mark.parametrize(("told", "group"), [("2", 1), ("1", 3)])
def test_a_group_of_other_processes_is_noticed(monkeypatch, told, group):
    ranks = {"RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    monkeypatch.setattr(parallel.os, "environ", {"WORLD_SIZE": told} | ranks)
    monkeypatch.setattr(parallel.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(parallel.dist, "get_world_size", lambda: group)
    with pytest.raises(ConfigError, match=f"group of {group}, and WORLD_SIZE says {told}"):
        Parallel.start()


def test_an_engine_leaves_no_peer(monkeypatch):
    monkeypatch.setattr(parallel.dist, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match="torchrun"):
        ALONE.check_kind(Train(parallel="fsdp"))


def test_auto_is_bf16_and_triton_on_cuda_alone(monkeypatch):
    from stillroom.pipeline.training import run

    monkeypatch.setattr(run, "triton_runs_on", lambda _device: True)
    on_gpu = resolved(Train(), torch.device("cuda"))
    assert (on_gpu.precision, on_gpu.kernel) == ("bfloat16", "triton")
    on_cpu = resolved(Train(), torch.device("cpu"))
    assert (on_cpu.precision, on_cpu.kernel) == ("float32", "chunked")
    told = Train(precision="float32", kernel="eager")
    assert resolved(told, torch.device("cuda")) == told


class Tracker:
    """Stands for wandb or trackio: keeps what it is called with."""

    def __init__(self):
        self.begun, self.logged = [], []

    def init(self, **told):
        self.begun.append(told)
        return self

    def log(self, values, step):
        self.logged.append(step)

    def finish(self):
        pass


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_goes_on_with_the_same_run(tmp_path, monkeypatch, name):
    tracker = Tracker()
    monkeypatch.setitem(sys.modules, name, tracker)
    for step in (0, 3):
        log = metrics.MetricsLog(tmp_path, step, name, "run", {"train": {"steps": 5}})
        log.write(step + 1, {"loss": 1.0})
        log.close()
    first, second = tracker.begun
    assert first == second
    assert first["config"] == {"train": {"steps": 5}}
    assert first["resume"] == "allow"
    assert tracker.logged == [1, 4]
    other = tmp_path / "other"
    other.mkdir()
    metrics.MetricsLog(other, 0, name, "run", {}).close()
    key = "id" if name == "wandb" else "name"
    assert tracker.begun[-1][key] != first[key]
