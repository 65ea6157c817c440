"""The main job through the real command line: prepare, capture, train, evaluate, with kills."""

import json
import random
import shutil

import pytest

from stillroom.pipeline.training.metrics import read_metrics
from tests import tiny_models
from tests.stage_processes import finish, kill_when, start

KILLS = 20
STEPS = 3 * KILLS

RUN = """
name = "{name}"
directory = "{directory}"
[teacher]
model = "{teacher}"
[prepare]
window = 48
[[prepare.source]]
name = "help"
kind = "pydoc_topics"
limit = 10
[capture]
k = 16
hidden_layers = [2, "final"]
examples_per_shard = 9
[student]
keep_layers = [0, 2]
[[objective]]
name = "{objective}"
[train]
steps = {steps}
batch_tokens = 192
checkpoint_every = 2
cache = "{cache}"
"""


class Job:
    """One run file and what its stages left behind."""

    def __init__(self, root, name, teacher, objective="forward_kl", cache="", steps=STEPS):
        self.directory, self.log = root / name, root / f"{name}.log"
        self.file = root / f"{name}.toml"
        values = {"name": name, "directory": self.directory, "teacher": teacher}
        text = RUN.format(objective=objective, cache=cache, steps=steps, **values)
        self.file.write_text(text)

    def run(self, stage, *more) -> None:
        code = finish(start(stage, self.file, *more, log=self.log))
        assert code == 0, self.log.read_text()[-2000:]

    def receipts(self) -> list:
        return sorted((self.directory / "cache" / "receipts").rglob("*.json"))

    def manifest(self) -> bytes:
        return (self.directory / "cache" / "manifest.json").read_bytes()

    def losses(self) -> list[float]:
        return [line["loss"] for line in read_metrics(self.directory)]

    def weights(self) -> bytes:
        return (self.directory / "student" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_models.save_llama(tmp_path_factory.mktemp("teacher") / "teacher", num_layers=3)


@pytest.fixture(scope="module")
def uninterrupted(teacher, tmp_path_factory):
    job = Job(tmp_path_factory.mktemp("main") / "", "whole", teacher)
    job.run("prepare")
    job.run("capture", "--engine", "reference")
    job.run("student")
    job.run("train")
    return job


@pytest.mark.slow
def test_a_capture_killed_at_random_moments_seals_the_same(uninterrupted, teacher, tmp_path):
    job, dice = Job(tmp_path, "killed", teacher), random.Random(0)
    job.run("prepare")
    shards = len(uninterrupted.receipts())
    assert shards > KILLS
    finished = {}
    for number in range(KILLS):
        process = start("capture", job.file, "--engine", "reference", log=job.log)
        kill_when(process, lambda n=number: len(job.receipts()) >= n, dice.uniform(0, 0.3))
        assert not (job.directory / "cache" / "manifest.json").exists()
        kept = {path: path.stat().st_mtime_ns for path in job.receipts()}
        assert finished.items() <= kept.items()
        finished = kept
    job.run("capture", "--engine", "reference")
    assert job.manifest() == uninterrupted.manifest()
    job.run("capture", "--engine", "reference")
    assert finished.items() <= {path: path.stat().st_mtime_ns for path in job.receipts()}.items()


@pytest.mark.slow
def test_a_training_killed_at_random_moments_ends_the_same_without_its_teacher(
    uninterrupted, teacher, tmp_path
):
    moved = shutil.copytree(teacher, tmp_path / "teacher")
    cache = uninterrupted.directory / "cache"
    job, dice = Job(tmp_path, "killed", moved, cache=cache), random.Random(1)
    job.run("student")
    shutil.rmtree(moved)
    for number in range(KILLS):
        process = start("train", job.file, log=job.log)
        due = 3 * number
        kill_when(process, lambda n=due: len(job.losses()) >= n, dice.uniform(0, 0.2))
    job.run("train")
    assert len(job.losses()) == STEPS
    assert job.losses() == uninterrupted.losses()
    assert job.weights() == uninterrupted.weights()


@pytest.mark.slow
def test_the_student_learns_from_its_teacher_and_loads_as_a_plain_model(uninterrupted):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    uninterrupted.run("evaluate")
    found = json.loads((uninterrupted.directory / "evaluation.json").read_text())["models"]
    assert found["after"]["kl"] < 0.9 * found["before"]["kl"]
    assert found["teacher"]["kl"] == 0
    assert (uninterrupted.directory / "curves.png").read_bytes()[:4] == b"\x89PNG"
    student = AutoModelForCausalLM.from_pretrained(uninterrupted.directory / "student")
    assert student.config.num_hidden_layers == 2
    assert len(AutoTokenizer.from_pretrained(uninterrupted.directory / "student")) == 768
    stages = json.loads((uninterrupted.directory / "run.json").read_text())
    assert {"prepare", "capture", "train", "evaluate"} <= set(stages)


@pytest.mark.slow
def test_the_cache_commands_agree_about_a_sealed_cache(uninterrupted):
    cache = uninterrupted.directory / "cache"
    for command in (("verify", cache), ("show", uninterrupted.file), ("ls", cache.parent)):
        assert finish(start("cache", *command, log=uninterrupted.log)) == 0
