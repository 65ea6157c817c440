"""Every kind of encoder: targets against the model called by hand, settings, refusals."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stillroom.cache_schemas.errors import ConfigError, StillroomError, TeacherError
from stillroom.pipeline.config import Teacher
from stillroom.pipeline.config.vision import Encoder
from stillroom.pipeline.encoders.frozen import on_grid, open_encoder
from tests import tiny_encoders


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Kind -> HF directory."""
    root = tmp_path_factory.mktemp("encoders")
    return {kind: tiny_encoders.save(kind, root / kind) for kind in tiny_encoders.KINDS}


def table(kind, directory, **more):
    size = tiny_encoders.SIZES.get(kind, 56)
    return Encoder(**{"name": "x", "kind": kind, "model": str(directory), "size": size} | more)


def pixels(size, count=3):
    return np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8)


def normalised(encoder, batch):
    mean, std = (
        np.array(v)[:, None, None] for v in (encoder.preparation.mean, encoder.preparation.std)
    )
    return torch.tensor((batch / 255 - mean) / std, dtype=torch.float32)


@pytest.mark.parametrize("kind", tiny_encoders.KINDS)
def test_shape_is_known_before_any_picture_and_holds_for_all(kind, directories):
    encoder = open_encoder(table(kind, directories[kind]))
    assert encoder.shape == tiny_encoders.SHAPES[kind]
    found = encoder(pixels(encoder.preparation.size))
    assert found.shape == (3, *encoder.shape)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    assert np.abs(found[0] - found[1]).max() > 0


@pytest.mark.parametrize("kind", tiny_encoders.KINDS)
def test_a_picture_gets_the_same_target_in_any_batch(kind, directories):
    encoder = open_encoder(table(kind, directories[kind]))
    batch = pixels(encoder.preparation.size)
    np.testing.assert_allclose(encoder(batch)[1:2], encoder(batch[1:2]), rtol=1e-4, atol=1e-4)


def test_dinov2_layers_are_blocks_counted_from_one(directories):
    from transformers import Dinov2Model

    encoder = open_encoder(table("dinov2", directories["dinov2"], layers=[2, 4]))
    batch = pixels(56)
    with torch.no_grad():
        states = Dinov2Model.from_pretrained(directories["dinov2"])(
            normalised(encoder, batch), output_hidden_states=True
        ).hidden_states
    wanted = (states[2] + states[4])[:, 1:] / 2
    np.testing.assert_allclose(encoder(batch), wanted.numpy(), rtol=1e-5, atol=1e-5)


def test_final_norm_applies_to_every_layer(directories):
    from transformers import Dinov2Model

    asked = table("dinov2", directories["dinov2"], layers=[1, 3], final_norm=True)
    encoder, batch = open_encoder(asked), pixels(56)
    model = Dinov2Model.from_pretrained(directories["dinov2"])
    with torch.no_grad():
        states = model(normalised(encoder, batch), output_hidden_states=True).hidden_states
        wanted = (model.layernorm(states[1]) + model.layernorm(states[3]))[:, 1:] / 2
    np.testing.assert_allclose(encoder(batch), wanted.numpy(), rtol=1e-5, atol=1e-5)


def test_depth_anything_is_the_mean_of_what_its_decoder_reads(directories):
    from transformers import DepthAnythingForDepthEstimation

    encoder, batch = (
        open_encoder(table("depth_anything", directories["depth_anything"])),
        pixels(56),
    )
    model = DepthAnythingForDepthEstimation.from_pretrained(directories["depth_anything"]).eval()
    with torch.no_grad():
        maps = model.backbone(normalised(encoder, batch)).feature_maps
    assert len(maps) == 4
    wanted = sum(m[:, 1:] for m in maps) / 4
    np.testing.assert_allclose(encoder(batch), wanted.numpy(), rtol=1e-5, atol=1e-5)


def test_teacher_tower_is_what_the_language_model_reads(directories):
    from transformers import LlavaForConditionalGeneration

    asked = Encoder(name="x", kind="teacher_tower")
    encoder = open_encoder(asked, Teacher(model=str(directories["teacher_tower"])))
    assert encoder.preparation.size == 56
    batch = pixels(56)
    model = LlavaForConditionalGeneration.from_pretrained(directories["teacher_tower"]).eval()
    with torch.no_grad():
        projected = model.model.get_image_features(pixel_values=normalised(encoder, batch))
        ours = model.model.multi_modal_projector(torch.from_numpy(encoder(batch)))
    wanted = torch.stack(list(projected.pooler_output))
    np.testing.assert_allclose(ours.numpy(), wanted.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "name", "prefix"), [("clip", "CLIP", 1), ("siglip", "Siglip", 0)])
def test_clip_and_siglip_are_the_towers_last_patches(kind, name, prefix, directories):
    import transformers

    encoder, batch = open_encoder(table(kind, directories[kind])), pixels(56)
    model = getattr(transformers, f"{name}VisionModel").from_pretrained(directories[kind]).eval()
    with torch.no_grad():
        wanted = model(normalised(encoder, batch)).last_hidden_state[:, prefix:]
    np.testing.assert_allclose(encoder(batch), wanted.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "name"), [("mask2former", "Mask2Former"), ("oneformer", "OneFormer")]
)
def test_segmenters_are_what_the_whole_model_says_of_its_backbone(kind, name, directories):
    import transformers

    encoder, batch = open_encoder(table(kind, directories[kind])), pixels(64)
    model = getattr(transformers, f"{name}Model").from_pretrained(directories[kind]).eval()
    more = {"task_inputs": torch.zeros(3, 5, dtype=torch.int64)} if kind == "oneformer" else {}
    with torch.no_grad():
        seen = model(normalised(encoder, batch), **more, output_hidden_states=True)
    wanted = seen.encoder_hidden_states[-1].flatten(2).transpose(1, 2)
    np.testing.assert_allclose(encoder(batch), wanted.numpy(), rtol=1e-4, atol=1e-5)


def test_unclip_target_is_the_projected_embedding(directories):
    from transformers import CLIPVisionModelWithProjection

    encoder, batch = open_encoder(table("clip_embeds", directories["clip_embeds"])), pixels(56)
    model = CLIPVisionModelWithProjection.from_pretrained(directories["clip_embeds"]).eval()
    with torch.no_grad():
        wanted = model(normalised(encoder, batch)).image_embeds[:, None]
    np.testing.assert_allclose(encoder(batch), wanted.numpy(), rtol=1e-4, atol=1e-5)


def test_a_larger_picture_gives_a_larger_grid(directories):
    for kind in ("dinov2", "clip", "siglip", "depth_anything"):
        assert open_encoder(table(kind, directories[kind], size=84)).shape == (36, 32)


def test_class_token_and_mean(directories):
    whole = open_encoder(table("clip", directories["clip"]))
    mean = open_encoder(table("clip", directories["clip"], tokens="mean"))
    batch = pixels(56)
    np.testing.assert_allclose(mean(batch)[:, 0], whole(batch).mean(axis=1), rtol=1e-4, atol=1e-5)
    assert open_encoder(table("clip", directories["clip"], tokens="cls")).shape == (1, 32)
    with pytest.raises(ConfigError, match="no class token"):
        open_encoder(table("siglip", directories["siglip"], tokens="cls"))


def test_pooling_averages_neighbouring_patches():
    features = torch.randn(2, 24 * 24, 5, generator=torch.Generator().manual_seed(0))
    pooled = on_grid(features, 12).view(2, 12, 12, 5)
    square = features.view(2, 24, 24, 5)
    by_hand = (
        square[:, ::2, ::2] + square[:, 1::2, ::2] + square[:, ::2, 1::2] + square[:, 1::2, 1::2]
    ) / 4
    torch.testing.assert_close(pooled, by_hand)
    grown = on_grid(features, 30)
    wanted = F.interpolate(
        features.transpose(1, 2).view(2, 5, 24, 24), size=(30, 30), mode="bilinear"
    )
    torch.testing.assert_close(grown, wanted.flatten(2).transpose(1, 2))
    assert on_grid(features, 24) is features
    with pytest.raises(ConfigError, match="no square grid"):
        on_grid(features[:, :7], 2)


def test_settings_that_a_kind_does_not_have_are_refused(directories):
    with pytest.raises(ConfigError, match="layer 9 of an encoder of 4 blocks"):
        open_encoder(table("dinov2", directories["dinov2"], layers=[9]))
    with pytest.raises(ConfigError, match="no layers to choose"):
        open_encoder(table("clip_embeds", directories["clip_embeds"], layers=[1]))
    with pytest.raises(ConfigError, match="backbone of 4 stages"):
        open_encoder(table("mask2former", directories["mask2former"], layers=[5]))
    with pytest.raises(ConfigError, match="names no model"):
        open_encoder(Encoder(name="x", kind="clip"))


def test_a_swin_stage_can_be_chosen(directories):
    third = open_encoder(table("oneformer", directories["oneformer"], layers=[3]))
    assert third.shape == (16, 32)


def test_a_checkpoint_of_another_kind_is_refused(directories):
    with pytest.raises(TeacherError, match="not in the checkpoint"):
        open_encoder(table("siglip", directories["dinov2"]))
    with pytest.raises(TeacherError, match="cannot be loaded"):
        open_encoder(table("efficientnet_lite0", directories["clip"]))


def test_a_size_that_the_encoder_cannot_take_is_refused(directories):
    with pytest.raises(StillroomError, match="does not take pictures of 9 pixels"):
        open_encoder(table("dinov2", directories["dinov2"], size=9))


def test_facts_tell_two_encoders_apart(directories, tmp_path):
    other = tiny_encoders.save("dinov2", tmp_path / "other", seed=1)
    found = [
        open_encoder(table("dinov2", directory)).facts
        for directory in (directories["dinov2"], directories["dinov2"], other)
    ]
    assert found[0] == found[1]
    assert found[0]["weights_sha256"] != found[2]["weights_sha256"]
    assert found[0]["preparation"]["size"] == 56


def test_preparation_comes_from_the_models_files_unless_told(directories, tmp_path):
    import json
    import shutil

    own = tmp_path / "own"
    shutil.copytree(directories["dinov2"], own)
    stated = {
        "size": {"shortest_edge": 70},
        "crop_size": {"height": 42, "width": 42},
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "resample": 2,
    }
    (own / "preprocessor_config.json").write_text(json.dumps(stated))
    found = open_encoder(Encoder(name="x", kind="dinov2", model=str(own))).preparation
    assert (found.size, found.resample, found.mean) == (42, "bilinear", (0.1, 0.2, 0.3))
    told = open_encoder(Encoder(name="x", kind="dinov2", model=str(own), size=56)).preparation
    assert told.size == 56
