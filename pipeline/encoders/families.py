"""Nine kinds of image encoder: how each is loaded, and where its features are.

One idea: a family is one function from a table and a directory to a model and its features. Weights
that a checkpoint does not have are an error, because a randomly initialised encoder gives targets
that look fine. What is done with the features is written once, in `frozen.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stillroom.cache_schemas.errors import ConfigError, TeacherError
from stillroom.pipeline.config.vision import Encoder
from stillroom.pipeline.encoders import efficientnet

Features = Callable[[torch.Tensor], torch.Tensor]
"""Normalised pixels [B, 3, S, S] -> [B, positions, width], patches in reading order."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class _Layers:
    """Which hidden states of a vision transformer are averaged, and which of their tokens count.

    Attributes:
        table: the encoder's table.
        prefix: class and register tokens before the patches.
        norm: the encoder's last layer norm.
    """

    table: Encoder
    prefix: int
    norm: nn.Module | None

    def mean(self, hidden_states: Any, final: torch.Tensor, layers: Any = None) -> torch.Tensor:
        chosen = [
            self._one(hidden_states, final, n) for n in layers or self.table.layers or ["final"]
        ]
        return self.tokens(torch.stack(chosen).mean(dim=0))

    def tokens(self, states: torch.Tensor) -> torch.Tensor:
        if self.table.tokens == "cls":
            return states[:, :1]  # the class token comes first
        patches = states[:, self.prefix :]  # [B, positions, width]
        return patches.mean(dim=1, keepdim=True) if self.table.tokens == "mean" else patches

    def _one(self, hidden_states: Any, final: torch.Tensor, layer: int | str) -> torch.Tensor:
        if layer == "final":
            return final
        state = hidden_states[layer]
        return self.norm(state) if self.table.final_norm and self.norm is not None else state

    def check(self, depth: int) -> "_Layers":
        where = f"[[vision.encoder]] '{self.table.name}'"
        for layer in self.table.layers:
            if layer != "final" and not 1 <= layer <= depth:
                raise ConfigError(
                    f"layer {layer} of an encoder of {depth} blocks",
                    expected=f"1 to {depth}, or 'final'",
                    where=where,
                )
        if self.table.tokens == "cls" and not self.prefix:
            raise ConfigError("has no class token", where=where, remedy="Use tokens = 'mean'.")
        return self


def _transformer(class_name: str, has_class_token: bool, norm: str, interpolates: bool):
    """A family of plain vision transformers."""

    def family(table: Encoder, directory: Path) -> tuple[nn.Module, Features]:
        model = _load(class_name, table, directory)
        prefix = has_class_token + getattr(model.config, "num_register_tokens", 0)
        chosen = _Layers(table, prefix, getattr(model, norm, None))
        chosen.check(model.config.num_hidden_layers)
        options = {"interpolate_pos_encoding": True} if interpolates else {}

        def features(pixels: torch.Tensor) -> torch.Tensor:
            out = model(pixel_values=pixels, output_hidden_states=True, **options)
            return chosen.mean(out.hidden_states, out.last_hidden_state)

        return model, features

    return family


def _depth_anything(table: Encoder, directory: Path) -> tuple[nn.Module, Features]:
    """Depth-Anything-V2's DINOv2 backbone; without `layers`, the mean of what its decoder reads."""
    model = _load("DepthAnythingForDepthEstimation", table, directory)
    backbone: Any = model.backbone
    chosen = _Layers(
        table, 1 + getattr(backbone.config, "num_register_tokens", 0), backbone.layernorm
    )
    chosen.check(backbone.config.num_hidden_layers)

    def features(pixels: torch.Tensor) -> torch.Tensor:
        out = backbone(pixels, output_hidden_states=True)
        if not table.layers:
            return chosen.tokens(torch.stack(out.feature_maps).mean(dim=0))
        return chosen.mean(out.hidden_states, out.hidden_states[-1])

    return model, features


def _segmenter(class_name: str):
    """Swin backbone of a segmentation model: one stage's map, the last unless `layers` names it."""

    def family(table: Encoder, directory: Path) -> tuple[nn.Module, Features]:
        model = _load(class_name, table, directory)
        backbone: Any = model.pixel_level_module.encoder
        stage = _stage(table, len(backbone.channels))
        return model, lambda pixels: _flat(backbone(pixels).feature_maps[stage], table)

    return family


def _clip_embeds(table: Encoder, directory: Path) -> tuple[nn.Module, Features]:
    """The projected image embedding that unCLIP is conditioned on: one position."""
    model = _load("CLIPVisionModelWithProjection", table, directory)
    _refuse_layers(table)
    return model, lambda pixels: model(
        pixel_values=pixels, interpolate_pos_encoding=True
    ).image_embeds[:, None]


def _efficientnet(table: Encoder, directory: Path) -> tuple[nn.Module, Features]:
    """Last feature map, [49, 1280] at 224 pixels."""
    _refuse_layers(table)
    try:
        model = efficientnet.load(directory).to(DTYPES[table.dtype])
    except (OSError, RuntimeError, KeyError) as error:
        raise _unloadable(directory, error) from None
    return model, lambda pixels: _flat(model.features(pixels), table)


def _teacher_tower(table: Encoder, directory: Path) -> tuple[nn.Module, Features]:
    """The vision tower of a LLaVA-type teacher, before its projector."""
    whole = _load("AutoModelForImageTextToText", table, directory)
    tower: Any = getattr(getattr(whole, "model", whole), "vision_tower", None)
    if tower is None:
        raise TeacherError(
            f"{type(whole).__name__} has no vision_tower",
            expected="a LLaVA-type model",
            where=str(directory),
        )
    read = getattr(whole.config, "vision_feature_layer", -1)
    read = [read] if isinstance(read, int) else list(read)
    # "default" means that the tower has a class token, which the language model does not see.
    prefix = int(getattr(whole.config, "vision_feature_select_strategy", "") == "default")
    chosen = _Layers(table, prefix, None).check(tower.config.num_hidden_layers)

    def features(pixels: torch.Tensor) -> torch.Tensor:
        out = tower(pixel_values=pixels, output_hidden_states=True)
        return chosen.mean(out.hidden_states, out.last_hidden_state, table.layers or read)

    return tower, features


FAMILIES: dict[str, Callable[[Encoder, Path], tuple[nn.Module, Features]]] = {
    "dinov2": _transformer("Dinov2Model", True, "layernorm", interpolates=False),
    "clip": _transformer("CLIPVisionModel", True, "post_layernorm", interpolates=True),
    "siglip": _transformer("SiglipVisionModel", False, "post_layernorm", interpolates=True),
    "depth_anything": _depth_anything,
    "mask2former": _segmenter("Mask2FormerModel"),
    "oneformer": _segmenter("OneFormerModel"),
    "clip_embeds": _clip_embeds,
    "efficientnet_lite0": _efficientnet,
    "teacher_tower": _teacher_tower,
}


def _load(class_name: str, table: Encoder, directory: Path) -> Any:
    import transformers

    try:
        model, found = getattr(transformers, class_name).from_pretrained(
            directory, dtype=DTYPES[table.dtype], output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise _unloadable(directory, error) from None
    lacking = [*found["missing_keys"], *found["mismatched_keys"]]
    if lacking:
        raise TeacherError(
            f"{len(lacking)} weights of {class_name} are not in the checkpoint, first {lacking[0]}",
            where=str(directory),
            remedy=f"Check that kind = '{table.kind}' is what this directory holds.",
        )
    return model


def _unloadable(directory: Path, error: Exception) -> TeacherError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
    return TeacherError(f"cannot be loaded ({reason})", where=str(directory))


def _flat(feature_map: torch.Tensor, table: Encoder) -> torch.Tensor:
    """[B, width, H, W] -> [B, H * W, width], or their mean [B, 1, width]."""
    patches = feature_map.flatten(2).transpose(1, 2)  # [B, H * W, width]
    return patches.mean(dim=1, keepdim=True) if table.tokens == "mean" else patches


def _stage(table: Encoder, stages: int) -> int:
    if not table.layers:
        return -1
    (stage, *more) = table.layers
    if more or not isinstance(stage, int) or not 1 <= stage <= stages:
        raise ConfigError(
            f"layers = {list(table.layers)} of a backbone of {stages} stages",
            expected=f"one number from 1 to {stages}",
            where=f"[[vision.encoder]] '{table.name}'",
        )
    return stage - 1


def _refuse_layers(table: Encoder) -> None:
    if table.layers:
        raise ConfigError(
            f"kind = '{table.kind}' has no layers to choose",
            where=f"[[vision.encoder]] '{table.name}' layers",
        )
