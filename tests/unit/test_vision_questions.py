"""Questions that share a picture's states are answered as if each had been asked alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from stillroom.pipeline.student.llava_parts import assemble, name_for_vllm, save_processor
from stillroom.stages.demos.answering import Answerer, blind
from stillroom.stages.demos.questions import lay_out, states_of
from stillroom.stages.demos.small_vlm import (
    IMAGE_TOKENS,
    LAYER,
    PIXELS,
    PREPROCESSOR,
    Picture,
    features_of,
    moved,
    normalise,
    prompts,
    save_language_model,
)

SHAPE = (3, PIXELS, PIXELS)
ASKED = [
    [("what shape is in the image ?", "circle"), ("is there a red shape ?", "yes")],
    [("what color is the shape ?", "red")],
    [("is no circle present ?", "no"), ("what shape is present ?", "triangle")],
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A random model of the small teacher's shape, as an HF directory."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    root = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=PIXELS,
        patch_size=8,
        initializer_range=0.5,
    )
    CLIPVisionModel(config).save_pretrained(root / "tower")
    stated = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    (root / "tower" / PREPROCESSOR).write_text(json.dumps(stated))
    language = save_language_model(root / "language", 32, 2, seed=0)
    model = assemble(root / "tower", language, LAYER)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(root / "model")
    name_for_vllm(root / "model")
    save_processor(language, root / "tower", model, root / "model")
    return root / "model"


def pictures():
    random = np.random.default_rng(0)
    return [
        Picture(
            Path("none"), random.integers(0, 256, (3, PIXELS, PIXELS), dtype=np.uint8), tuple(q)
        )
        for q in ASKED
    ]


def alone(answerer, picture, question):
    """Logits of the answer, from one ordinary prompt."""
    ids, at = prompts(answerer.tokenizer, [question])
    pixels = normalise(torch.from_numpy(picture.pixels)[None])
    return answerer.model(input_ids=ids[:, : int(at) + 1], pixel_values=pixels).logits[0, -1]


@torch.inference_mode()
def test_a_shared_picture_changes_no_answer(directory):
    answerer, asked = Answerer(directory), pictures()
    pixels = torch.from_numpy(np.stack([picture.pixels for picture in asked]))
    features = features_of(answerer.model, pixels)
    plan = lay_out(answerer.tokenizer, ASKED, 1 + IMAGE_TOKENS, answered=False)
    user = answerer.tokenizer.convert_tokens_to_ids("<user>")
    states = states_of(answerer.model, features, plan, user)
    found = answerer.model.lm_head(states[plan.row, plan.column])
    wanted = [alone(answerer, p, question) for p in asked for question, _ in p.questions]
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-4, atol=1e-5)
    said = [word for words in answerer.answer(asked).said for word in words]
    best = [int(logits.argmax()) for logits in wanted]
    assert said == answerer.tokenizer.convert_ids_to_tokens(best)


@torch.inference_mode()
def test_answers_in_the_sequence_are_not_seen_by_other_questions(directory):
    answerer, asked = Answerer(directory), pictures()
    pixels = torch.from_numpy(np.stack([picture.pixels for picture in asked]))
    features = features_of(answerer.model, pixels)
    user = answerer.tokenizer.convert_tokens_to_ids("<user>")
    found = []
    for answered in (False, True):
        plan = lay_out(answerer.tokenizer, ASKED, 1 + IMAGE_TOKENS, answered)
        found.append(states_of(answerer.model, features, plan, user)[plan.row, plan.column])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_blind_answers_are_the_most_common_ones():
    train = pictures()
    found = blind(train, train)
    assert found["question"] == 1.0
    assert found["majority"] == pytest.approx(1 / 5)


def test_moved_pictures_keep_their_colours_and_size():
    plain = torch.full((4, 3, PIXELS, PIXELS), 7, dtype=torch.uint8)
    plain[:, 0, 30:34, 30:34] = 200
    found = moved(plain)
    assert found.shape == plain.shape
    assert (found[:, 0] == 200).flatten(1).sum(1).tolist() == [16] * 4
