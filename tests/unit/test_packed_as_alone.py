"""What a student says of a packed text is what it says of the text alone, at a run's lengths."""

import pytest
import torch

from stillroom.pipeline.student import apart
from stillroom.pipeline.student.apart import (
    ACROSS,
    LONGEST,
    PLACE,
    heeds_the_longest,
    joined_by,
    keeps_documents_apart,
)
from tests import student_architectures

WORDS = 64
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 16,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LONG = {
    "longrope": ("phi3", {"original_max_position_embeddings": 16, "rope_parameters": LONGROPE}),
    "dynamic": ("llama", {"max_position_embeddings": 16, "rope_parameters": DYNAMIC}),
}
"""What turns all positions by the farthest, beyond 16 tokens."""


def made(architecture, dtype=torch.float32, **more):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = student_architectures.config_of(
        architecture, WORDS, **{"initializer_range": 0.02, **more}
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("longest", [9, 1000])
def test_attention_cut_by_places_in_the_row_is_found(longest, dtype):
    """Llama 4 sees 16 places here, counted from the row's first token."""
    model = made("llama4_text", dtype)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert joined_by(model, WORDS, 16, min(longest, 16)) == ""
    for row in (17, 32, 33, 48):
        assert joined_by(model, WORDS, row, min(longest, row)) == PLACE.format(row=row)
    assert model.training
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LONG)
def test_positions_turned_by_the_longest_text_are_found(kind, dtype):
    architecture, more = LONG[kind]
    model = made(architecture, dtype, **more)
    assert joined_by(model, WORDS, 40, 16) == ""
    assert not heeds_the_longest(model, WORDS, 16)
    for longest in (17, 40):
        assert joined_by(model, WORDS, 40, longest) == LONGEST.format(longest=longest)
        assert heeds_the_longest(model, WORDS, longest)


@torch.no_grad()
@pytest.mark.parametrize("kind", LONG)
def test_measuring_leaves_the_turning_of_positions_as_it_was(kind):
    architecture, more = LONG[kind]
    model = made(architecture, **more).eval()
    ids = torch.arange(20)[None]
    before = [model(ids[:, :length]).logits for length in (10, 20)]
    model(ids[:, :10])
    joined_by(model, WORDS, 40, 40)
    heeds_the_longest(model, WORDS, 40)
    after = [model(ids[:, :length]).logits for length in (10, 20)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "olmoe", "deepseek_v3", "gpt2"])
def test_what_keeps_documents_apart_does_so_in_long_rows(architecture):
    model = made(architecture)
    assert keeps_documents_apart(model, WORDS, 200, 150)
    assert not heeds_the_longest(model, WORDS, 150)


def test_what_looks_across_does_so_at_any_length():
    model = made("lfm2")
    assert joined_by(model, WORDS, 40, 30) == ACROSS
    assert not heeds_the_longest(model, WORDS, 30)


@pytest.mark.parametrize("room", ["quantised", "out of memory"])
def test_where_nothing_can_be_measured_the_config_is_asked(monkeypatch, room):
    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def integers(_):
        return False

    if room == "quantised":
        monkeypatch.setattr(torch.nn.Parameter, "is_floating_point", integers)
    else:
        monkeypatch.setattr(apart, "_is_one_anywhere", fails)
        monkeypatch.setattr(apart, "_is_one_beside", fails)
    chunked = made("llama4_text")
    assert [joined_by(chunked, WORDS, row, 9) for row in (16, 17)] == ["", PLACE.format(row=17)]
    for architecture, more in LONG.values():
        model = made(architecture, **more)
        assert joined_by(model, WORDS, 40, 16) == ""
        assert joined_by(model, WORDS, 40, 17) == LONGEST.format(longest=17)
        assert [heeds_the_longest(model, WORDS, longest) for longest in (16, 17)] == [False, True]
