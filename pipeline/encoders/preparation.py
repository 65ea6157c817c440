"""How an encoder wants its pictures: the table first, then the model's own files, then the kind.

One idea: everything is resolved to numbers before the plan is made, so that a plan says what was
done and needs no library's defaults to be understood.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from stillroom.pipeline.config.vision import Encoder

Resample = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
NORMAL = {
    "clip": (CLIP_MEAN, CLIP_STD),
    "clip_embeds": (CLIP_MEAN, CLIP_STD),
    "teacher_tower": (CLIP_MEAN, CLIP_STD),
    "siglip": (HALF, HALF),
}
"""Where a model's directory has no preprocessor_config.json; ImageNet's for all other kinds."""
SIZES = {"depth_anything": 336, "mask2former": 768, "oneformer": 768}
"""As OLA-VLM prepares them; they take precedence over the model's own."""


@dataclass(frozen=True, slots=True)
class Preparation:
    """How a picture becomes an encoder's input; part of the plan.

    Attributes:
        size: pixels of a side.
        crop: `squash` takes the whole picture, `center` its largest centred square.
        resample: Pillow's filter.
        mean, std: of the three channels, for values from 0 to 1.
    """

    size: int
    crop: Literal["squash", "center"] = "squash"
    resample: Resample = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def pixels(self, image: Image.Image) -> np.ndarray:
        """uint8 [3, size, size]; normalising is left to the encoder's device."""
        box = None if self.crop == "squash" else _centre(*image.size)
        side = (self.size, self.size)
        made = image.resize(side, Image.Resampling[self.resample.upper()], box=box)
        return np.ascontiguousarray(np.asarray(made, dtype=np.uint8).transpose(2, 0, 1))

    def facts(self) -> dict[str, Any]:
        """JSON for a plan."""
        return asdict(self)


def preparation_of(table: Encoder, directory: Path, config: Any) -> Preparation:
    """Resolve an encoder's preparation.

    Args:
        table: what was asked for.
        directory: the model's, where `preprocessor_config.json` may be.
        config: the model's config, for `image_size`.
    """
    stated = stated_preparation(directory)
    own = _side(stated.get("crop_size")) or _side(stated.get("size"))
    own = own or _side(getattr(config, "image_size", 0)) or 224
    mean, std = NORMAL.get(table.kind, (IMAGENET_MEAN, IMAGENET_STD))
    return Preparation(
        size=table.size or SIZES.get(table.kind, 0) or own,
        crop=table.crop,
        resample=_resample(stated),
        mean=tuple(stated.get("image_mean") or mean),
        std=tuple(stated.get("image_std") or std),
    )


def stated_preparation(directory: Path) -> dict[str, Any]:
    """A model's preprocessor_config.json, or the image part of its processor_config.json; empty
    where there is neither."""
    for name, key in (
        ("preprocessor_config.json", ""),
        ("processor_config.json", "image_processor"),
    ):
        path = directory / name
        if path.is_file():
            found = json.loads(path.read_text())
            return found.get(key, {}) if key else found
    return {}


def _side(size: Any) -> int:
    """One side of a size in any of the forms that image processors write."""
    if isinstance(size, dict):
        return int(size.get("shortest_edge") or size.get("height") or 0)
    if isinstance(size, (list, tuple)):
        return int(size[0])
    return int(size or 0)


def _resample(stated: dict[str, Any]) -> Any:
    return Image.Resampling(stated.get("resample", Image.Resampling.BICUBIC)).name.lower()


def _centre(width: int, height: int) -> tuple[float, float, float, float]:
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2  # halves of a pixel are allowed
    return (left, top, left + side, top + side)
