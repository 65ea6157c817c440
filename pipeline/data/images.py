"""The images of a microbatch: where they stand in it, their pixels, and what encoders said of them.

One idea: an image belongs to an example and is known by its content hash; pixels and targets are
looked up by that hash when the batch is made. An image without a target stays, with its mask at
False: that is the only meaning of the mask.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stillroom.cache_schemas.errors import StudentError, first_line
from stillroom.pipeline.images import BadImage, ReadImage, decode_image
from stillroom.pipeline.record import TeacherRecord

PIXELS_HELD = 4096
"""Prepared pictures kept in memory."""


@dataclass(frozen=True, slots=True)
class ImageTargets:
    """One vision cache's answers about a batch's images.

    Attributes:
        signals: `image.<encoder>` -> float32 [I, positions, width]; zeros where there is none.
        present: bool [I], the image has targets.
    """

    signals: dict[str, torch.Tensor]
    present: torch.Tensor


@dataclass(frozen=True, slots=True)
class ImageBatch:
    """The images of a microbatch, in the order of its examples.

    Attributes:
        names: content hashes [I].
        keys: int64 [I], equal where the hashes are.
        example: int64 [I], index into the batch's examples.
        document: int64 [I], flat index of the first token of the example.
        start: int64 [I], flat index of the first placeholder; the document's first token where the
            architecture has none.
        length: int64 [I], placeholders.
        pixels: float32 [I, 3, S, S], or None where the student sees no images.
        targets: vision cache -> its answers.
    """

    names: tuple[str, ...]
    keys: torch.Tensor
    example: torch.Tensor
    document: torch.Tensor
    start: torch.Tensor
    length: torch.Tensor
    pixels: torch.Tensor | None = None
    targets: dict[str, ImageTargets] = field(default_factory=dict)


def images_of(records: Sequence[TeacherRecord], starts: Sequence[int]) -> ImageBatch | None:
    """Where the images of packed examples stand; None where there are none.

    Args:
        records: the examples.
        starts: flat index of each one's first token.
    """
    spans = [
        (span, number, start)
        for number, (record, start) in enumerate(zip(records, starts, strict=True))
        for span in record.example.images
    ]
    if not spans:
        return None
    columns = [
        # A span that starts at -1 has no placeholder: the architecture needs none.
        (_key(span.sha256), number, start, start + max(span.start, 0), span.length)
        for span, number, start in spans
    ]
    keys, example, document, first, length = torch.tensor(columns, dtype=torch.int64).unbind(1)
    names = tuple(span.sha256 for span, _, _ in spans)
    return ImageBatch(names, keys, example, document, first, length)


class Pictures:
    """Looks up pixels and targets of images by their content hash.

    Args:
        read: sha256 -> bytes of the image file; None where the student sees no images.
        prepare: PIL image -> float32 [3, S, S], the student's own processor.
        caches: vision caches by name.
        signals: cache name -> signals to read.
    """

    def __init__(
        self,
        read: ReadImage | None,
        prepare: Callable[[Any], torch.Tensor] | None,
        caches: Mapping[str, Any] | None = None,
        signals: Mapping[str, Sequence[str]] | None = None,
    ):
        self._read, self._prepare = read, prepare
        self._caches, self._signals = dict(caches or {}), dict(signals or {})
        self._numbers = {name: _numbers(cache) for name, cache in self._caches.items()}
        self._held = lru_cache(PIXELS_HELD)(self._open)

    def fill(self, images: ImageBatch) -> ImageBatch:
        """The same images with pixels and targets.

        Raises:
            StudentError: an image file is gone or cannot be read; names it.
        """
        pixels = None
        if self._read is not None:
            pixels = torch.stack([self._held(name) for name in images.names])
        targets = {name: self._targets(name, images.names) for name in self._caches}
        return replace(images, pixels=pixels, targets=targets)

    def _open(self, name: str) -> torch.Tensor:
        assert self._read is not None
        assert self._prepare is not None
        try:
            return self._prepare(decode_image(self._read(name), name))
        except (FileNotFoundError, BadImage) as error:
            found = error.found if isinstance(error, BadImage) else "is gone"
            raise StudentError(
                f"image {name[:12]} {found}",
                where="the corpus's images",
                remedy="Restore the images folder of the prepared corpus, or prepare it again.",
            ) from None

    def _targets(self, cache: str, names: Sequence[str]) -> ImageTargets:
        numbers, signals = self._numbers[cache], sorted(self._signals[cache])
        found = [
            self._caches[cache].read(numbers[name], signals).signals if name in numbers else {}
            for name in names
        ]
        shapes = self._caches[cache].plan.dense_signals
        present = [bool(one) and all(len(one[s]) for s in signals) for one in found]
        stacked = {
            signal: torch.from_numpy(
                np.stack(
                    [
                        one[signal] if there else _blank(shapes[signal])
                        for one, there in zip(found, present, strict=True)
                    ]
                )
            )
            for signal in signals
        }
        return ImageTargets(stacked, torch.tensor(present))


def processor_of(directory: str | Path) -> Callable[[Any], torch.Tensor]:
    """A model's own image processor as a function: PIL image -> float32 [3, S, S].

    Raises:
        StudentError: the directory has none.
    """
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(
            directory, backend="pil", trust_remote_code=False
        )
    except (OSError, ValueError, ImportError) as error:
        reason = first_line(error)
        raise StudentError(
            f"no image processor can be loaded ({reason})", where=str(directory)
        ) from None
    return lambda image: processor(images=[image], return_tensors="pt")["pixel_values"][0]


def _key(name: str) -> int:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)  # an int64 can stand in a tensor


def _numbers(cache: Any) -> dict[str, int]:
    """Content hash -> number of the record."""
    ids = cache.index(["example_id"]).column("example_id").to_pylist()
    return {name: number for number, name in enumerate(ids)}


def _blank(shape: Mapping[str, Any]) -> np.ndarray:
    return np.zeros((shape["positions"], shape["width"]), dtype=np.float32)
