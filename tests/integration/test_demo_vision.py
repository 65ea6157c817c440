"""The vision demo from end to end on a handful of pictures, with the reference engine."""

import json

import pytest

from stillroom.stages.demos import vision as demo_vision
from stillroom.stages.demos.small_vlm import Recipe, read_pictures, train_teacher
from tests import tiny_encoders
from tests.pictures import save_questions

RUN = """
name = "vision"
directory = "{root}/run"
[teacher]
model = "{root}/run/models/teacher"
dtype = "float32"
[prepare]
window = 96
heldout = 0.1
[[prepare.source]]
name = "easy-vqa"
kind = "jsonl"
path = "{root}/data/train.jsonl"
messages_column = "messages"
image_column = "image"
[capture]
k = 8
temperatures = [0.25, 0.7, 1.0]
hidden_layers = [1, "final"]
hidden_codec = "fp16"
score_images = true
profile = "exact"
[vision]
images_per_shard = 8
[[vision.encoder]]
name = "dino"
kind = "dinov2"
model = "{root}/dino"
size = 56
[[vision.encoder]]
name = "efficientnet"
kind = "efficientnet_lite0"
model = "{root}/efficientnet"
size = 64
tokens = "mean"
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    data = tmp_path / "data"
    save_questions(data, "train", 12)
    save_questions(data, "test", 12, first_seed=100)
    tiny_encoders.save("dinov2", tmp_path / "dino")
    tiny_encoders.save("efficientnet_lite0", tmp_path / "efficientnet")
    monkeypatch.setattr(demo_vision, "DATA", data)
    (tmp_path / "run.toml").write_text(RUN.format(root=tmp_path))
    recipe = Recipe(width=32, blocks=2, tower_blocks=2, tower_epochs=1, language_epochs=1)
    train_teacher(data, tmp_path / "run" / "models" / "teacher", recipe)
    return tmp_path


def test_the_demo_from_pictures_to_page(root, capsys):
    arms = "joint,embedding,permuted_targets"
    options = {
        "engine": "reference",
        "seeds": 1,
        "steps": 2,
        "pictures": 8,
        "probed": 6,
        "probe_steps": 2,
    }
    demo_vision.demo_vision(root / "run.toml", arms=arms, **options)
    results = json.loads((root / "run" / "results.json").read_text())
    assert set(results["arms"]) == set(arms.split(","))
    assert results["test_questions"] == 16
    assert results["blind_accuracy"] == {"majority": 0.5, "question": 1.0}
    for found in results["arms"].values():
        (seed,) = found["seeds"].values()
        assert 0.0 <= seed["accuracy"] <= 1.0
        assert set(seed["probes"]) == {"dino", "efficientnet"}
        assert all(-1.0 <= v <= 1.0 for p in seed["probes"].values() for v in p.values())
    page = (root / "run" / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 8
    assert "what shape is in the image ?" in page
    assert "permuted_targets" in capsys.readouterr().out


def test_the_teacher_learns_and_is_kept(root):
    from stillroom.stages.demos.answering import Answerer

    data = root / "data"
    recipe = Recipe(width=32, blocks=2, tower_blocks=2, tower_epochs=1, language_epochs=120)
    made = train_teacher(data, root / "models" / "teacher", recipe)
    answers = Answerer(made).answer(read_pictures(data, "test"))
    assert answers.accuracy == 1.0
    stamp = (made / "model.safetensors").stat().st_mtime_ns
    assert train_teacher(data, made, recipe) == made
    assert (made / "model.safetensors").stat().st_mtime_ns == stamp
