"""Frozen image encoders behind one call: prepared pixels in, target [positions, width] out.

One idea: a family (`families.py`) says how to load a model and where its features are; normalising
pixels, pooling the grid and knowing the shape beforehand is written here, once.
"""

from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from stillroom.cache_schemas.errors import ConfigError, TeacherError, first_line
from stillroom.pipeline.config import Teacher
from stillroom.pipeline.config.vision import Encoder
from stillroom.pipeline.encoders.families import DTYPES, FAMILIES, Features
from stillroom.pipeline.encoders.preparation import preparation_of
from stillroom.pipeline.teacher.facts import model_config, model_directory
from stillroom.pipeline.teacher.identity import SILENT_KEYS, canonical_config, weights_sha256


class ImageEncoder:
    """One loaded encoder. Made by `open_encoder`."""

    def __init__(self, table: Encoder, directory: Path, model: nn.Module, features: Features):
        self.table, self.directory = table, directory
        self.preparation = preparation_of(table, directory, getattr(model, "config", None))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.to(self.device).eval().requires_grad_(False)
        self._features = features
        normal = (self.preparation.mean, self.preparation.std)
        self._mean, self._std = (torch.tensor(n, device=self.device)[:, None, None] for n in normal)

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Targets of a batch.

        Args:
            pixels: uint8 [B, 3, S, S], from `preparation.pixels`.

        Returns:
            float32 [B, positions, width].
        """
        scaled = torch.from_numpy(pixels).to(self.device).float().div_(255)  # [B, 3, S, S], 0 to 1
        normal = ((scaled - self._mean) / self._std).to(DTYPES[self.table.dtype])
        return on_grid(self._features(normal).float(), self.table.grid).cpu().numpy()

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(positions, width), from one blank picture."""
        blank = np.zeros((1, 3, self.preparation.size, self.preparation.size), dtype=np.uint8)
        positions, width = self(blank).shape[1:]
        return positions, width

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Identity and settings, for a plan."""
        table = self.table
        return {
            "kind": table.kind,
            "architecture": type(self._model).__name__,
            "weights_sha256": weights_sha256(self.directory),
            "config": canonical_config(self.directory / "config.json", SILENT_KEYS),
            "revision": table.revision,
            "dtype": table.dtype,
            "layers": list(table.layers),
            "final_norm": table.final_norm,
            "tokens": table.tokens,
            "grid": table.grid,
            "preparation": self.preparation.facts(),
            "transformers": version("transformers"),
        }


def open_encoder(table: Encoder, teacher: Teacher | None = None) -> ImageEncoder:
    """Load an encoder in inference mode, on the GPU where there is one.

    Raises:
        ConfigError: the table asks for what this kind of encoder does not have.
        TeacherError: the model cannot be loaded, or its checkpoint lacks weights.
    """
    directory = model_directory(_source(table, teacher))
    model, features = FAMILIES[table.kind](table, directory)
    encoder = ImageEncoder(table, directory, model, features)
    try:
        _ = encoder.shape
    except (ValueError, RuntimeError) as error:
        raise TeacherError(
            f"does not take pictures of {encoder.preparation.size} pixels ({first_line(error)})",
            where=f"[[vision.encoder]] '{table.name}'",
            remedy="Change size, or leave it out.",
        ) from None
    return encoder


def on_grid(features: torch.Tensor, grid: int) -> torch.Tensor:
    """Patches on a square grid of another side: averages where it shrinks, bilinear where it grows.

    Args:
        features: [B, side * side, width].
        grid: the new side; 0 changes nothing.

    Raises:
        ConfigError: the patches are no square.
    """
    batch, positions, width = features.shape
    side = int(positions**0.5)
    if not grid or grid * grid == positions:
        return features
    if side * side != positions or positions == 1:
        raise ConfigError(
            f"{positions} positions are no square grid of patches",
            where="[[vision.encoder]] grid",
            remedy="Leave grid out.",
        )
    image = features.transpose(1, 2).reshape(batch, width, side, side)
    if grid < side:
        made = F.adaptive_avg_pool2d(image, grid)
    else:
        made = F.interpolate(image, size=(grid, grid), mode="bilinear", align_corners=False)
    return made.flatten(2).transpose(1, 2)


def _check_overrides(table: Encoder, teacher: Teacher) -> None:
    """Refuse a teacher whose `hf_overrides` change its tower, which is read as its files say."""
    plain = teacher.model_copy(update={"engine_args": {}})
    as_run, as_written = (model_config(t).to_dict().get("vision_config") for t in (teacher, plain))
    if as_run != as_written:
        raise ConfigError(
            "the tower of a teacher is read without hf_overrides, and some change it",
            where=f"[[vision.encoder]] '{table.name}'",
            remedy="Write them into the config.json of a copy, and name that as model.",
        )


def _source(table: Encoder, teacher: Teacher | None) -> Teacher:
    if table.model:
        where = f"[[vision.encoder]] '{table.name}' model"
        return Teacher(model=table.model, revision=table.revision).named_by(where)
    if table.kind == "teacher_tower" and teacher is not None:
        if teacher.adapter:
            raise ConfigError(
                "the tower of a teacher with an adapter is not read",
                where=f"[[vision.encoder]] '{table.name}'",
                remedy="Merge adapter and model, and name the result as model.",
            )
        _check_overrides(table, teacher)
        return teacher
    raise ConfigError("names no model", where=f"[[vision.encoder]] '{table.name}' model")
