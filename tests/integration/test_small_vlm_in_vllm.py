"""The vision demo's teacher, and a student exported from a cache's run, under vLLM: the same
log-probabilities, states, places of the picture and answers as under transformers."""

import json
import subprocess
import sys

import pytest
import torch

from stillroom.pipeline.config import Prepare, Source, Student, Teacher
from stillroom.pipeline.corpus.preparing import prepare
from stillroom.pipeline.student.model import export, initial_student, load
from stillroom.stages.demos.small_vlm import LAYER, Recipe, save_language_model, train_teacher
from tests.pictures import save_questions

COMPARED = """
import json, sys
from stillroom.pipeline.config import Teacher
from stillroom.pipeline.corpus.preparing import Corpus
from stillroom.stages.demos.engine_agreement import compare

corpus = Corpus.open(sys.argv[2])
print(json.dumps(compare(Teacher(model=sys.argv[1]), corpus, 64)))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(directory of models, corpus of four questions about two pictures)."""
    root = tmp_path_factory.mktemp("small-vlm")
    save_questions(root, "train", 4)
    recipe = Recipe(width=32, blocks=2, tower_blocks=2, tower_epochs=2, language_epochs=2)
    teacher = train_teacher(root, root / "models" / "teacher", recipe)
    source = Source(
        name="s",
        kind="jsonl",
        path=str(root / "train.jsonl"),
        messages_column="messages",
        image_column="image",
    )
    table = Prepare(source=(source,), heldout=0.0, window=96)
    prepare(table, str(teacher), root / "corpus")
    return root


def agreement(model, world):
    command = [sys.executable, "-c", COMPARED, str(model), str(world / "corpus")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(found):
    assert found["examples"] == 8
    assert found["rejected"] == []
    assert found["answers"] <= found["logprob"] <= 1e-4
    assert 0 < found["answers_rounding"] <= found["rounding"] <= 1e-4
    assert found["hidden"] <= 1e-4
    assert found["same_rows"] == found["same_answers"] == 1.0


@pytest.mark.vllm
def test_the_demos_teacher(world):
    check(agreement(world / "models" / "teacher", world))


@pytest.mark.vllm
def test_an_exported_student(world):
    language = save_language_model(world / "language", 64, 2, seed=1)
    table = Student(
        init="parts",
        model=str(language),
        vision_model=str(world / "models" / "tower"),
        vision_layer=LAYER,
    )
    teacher = Teacher(model=str(world / "models" / "teacher"))
    initial = initial_student(table, teacher, world / "initial")
    model = load(initial)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    export(model, world / "student", initial, {})
    check(agreement(world / "student", world))
