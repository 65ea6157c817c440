"""Tiny image encoders of every kind as HF directories, and corpora that show pictures.

One idea: the real architectures with random weights at toy sizes, so that everything but the
learnt content of the targets is real.
"""

import hashlib
import json
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from stillroom.pipeline.config.vision import Kind
from stillroom.pipeline.corpus.files import ExampleFile, write_facts
from stillroom.pipeline.record import Example, ImageSpan, content_id
from tests.tiny_models import drawn

VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 56,
    "patch_size": 14,
}
KINDS = get_args(Kind)
SHAPES = {
    "dinov2": (16, 32),
    "clip": (16, 32),
    "siglip": (16, 32),
    "depth_anything": (16, 32),
    "mask2former": (4, 64),
    "oneformer": (4, 64),
    "clip_embeds": (1, 24),
    "efficientnet_lite0": (4, 1280),
    "teacher_tower": (16, 32),
}
SIZES = {"mask2former": 64, "oneformer": 64, "efficientnet_lite0": 64}
"""Pixels of a side; 56 for all others."""


def save(kind: str, directory: Path, seed: int = 0) -> Path:
    """A randomly initialised encoder of a kind."""
    if kind == "efficientnet_lite0":
        return _save_efficientnet(directory, seed)
    drawn(_MODELS[kind], seed).save_pretrained(directory)
    if kind in ("mask2former", "oneformer"):
        _as_published(directory / "model.safetensors")
    return directory


def save_corpus(directory: Path, prompts: list[list[bytes]], heldout: int = 0) -> list[str]:
    """A prepared corpus whose examples show these image files; the last `heldout` are held out.

    Returns:
        sha256 of every different image, in order of first appearance.
    """
    directory.mkdir(parents=True)
    names: dict[str, None] = {}
    examples = []
    for number, files in enumerate(prompts):
        spans = []
        for data in files:
            name = hashlib.sha256(data).hexdigest()
            path = directory / "images" / name[:2] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            names[name] = None
            spans.append(ImageSpan(name, 1 + 2 * len(spans), 2))
        tokens = np.arange(number, number + 12, dtype=np.int32)
        mask = np.arange(12) >= 8
        made = content_id(tokens, mask, tuple(spans))
        examples.append(Example(made, f"d{number}", "pictures", tokens, mask, tuple(spans)))
    cut = len(examples) - heldout
    for split, part in (("train", examples[:cut]), ("heldout", examples[cut:])):
        with ExampleFile(directory / f"{split}.arrow") as out:
            for example in part:
                out.write(example)
    write_facts(directory, {"digest": "0" * 64, "counts": {}, "settings": {"window": 12}})
    return list(names)


def _dinov2():
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(Dinov2Config(**VIT))


def _clip():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(CLIPVisionConfig(**VIT))


def _siglip():
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return SiglipVisionModel(SiglipVisionConfig(**VIT))


def _clip_embeds():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(CLIPVisionConfig(**VIT, projection_dim=24))


def _depth_anything():
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    backbone = Dinov2Config(
        **VIT, out_indices=[1, 2, 3, 4], reshape_hidden_states=False, apply_layernorm=True
    )
    return DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            backbone_config=backbone,
            reassemble_hidden_size=32,
            patch_size=14,
            neck_hidden_sizes=[8, 8, 8, 8],
            fusion_hidden_size=8,
        )
    )


def _swin():
    from transformers import SwinConfig

    return SwinConfig(
        image_size=64,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


SEGMENTER = {
    "encoder_feedforward_dim": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_attention_heads": 2,
    "dim_feedforward": 16,
    "num_queries": 4,
    "hidden_dim": 32,
}


def _mask2former():
    from transformers import Mask2FormerConfig, Mask2FormerModel

    made = Mask2FormerConfig(
        backbone_config=_swin(), feature_size=32, mask_feature_size=32, **SEGMENTER
    )
    return Mask2FormerModel(made)


def _oneformer():
    from transformers import OneFormerConfig, OneFormerModel

    made = OneFormerConfig(
        backbone_config=_swin(),
        mask_dim=32,
        conv_dim=32,
        text_encoder_width=16,
        task_seq_len=5,
        text_encoder_num_layers=1,
        text_encoder_vocab_size=100,
        text_encoder_context_length=5,
        **SEGMENTER,
    )
    return OneFormerModel(made)


def _llava():
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    text = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    made = LlavaConfig(vision_config=CLIPVisionConfig(**VIT), text_config=text, image_token_index=3)
    return LlavaForConditionalGeneration(made)


_MODELS = {
    "dinov2": _dinov2,
    "clip": _clip,
    "siglip": _siglip,
    "depth_anything": _depth_anything,
    "mask2former": _mask2former,
    "oneformer": _oneformer,
    "clip_embeds": _clip_embeds,
    "teacher_tower": _llava,
}


def _as_published(path: Path) -> None:
    """Name weights as published segmentation models have them, by the whole model."""
    from safetensors.torch import load_file, save_file

    named = {f"model.{name}": tensor for name, tensor in load_file(path).items()}
    save_file(named | {"class_predictor.bias": torch.zeros(3)}, path, {"format": "pt"})


def _save_efficientnet(directory: Path, seed: int) -> Path:
    from safetensors.torch import save_file

    from stillroom.pipeline.encoders.efficientnet import EfficientNetLite0

    model = drawn(lambda: EfficientNetLite0(classes=10), seed)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"architectures": ["EfficientNetLite0"]}))
    return directory
