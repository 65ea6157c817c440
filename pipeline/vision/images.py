"""Image files to pixels: strict about what is an image, exact about how it is resized.

One idea: every image goes through one door, for teacher, encoders and students alike, so that all
of them see the same picture: upright, RGB, eight bits. What cannot be that picture is refused with
the reason, before its pixels are unpacked where its header already tells.
"""

import io
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cache_schemas.errors import CorpusError

MAX_PIXELS = 1 << 26
"""About 67 megapixels: more than any camera in common use, less than what exhausts memory."""
MAX_BYTES = 1 << 28
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
Resample = Literal["nearest", "bilinear", "bicubic", "lanczos"]


class BadImage(CorpusError):
    """Bytes that are not one picture of a sensible size."""


def open_image(data: bytes, where: str = "") -> Image.Image:
    """One upright RGB picture.

    EXIF orientation is applied; 16-bit greys keep their high byte; CMYK, palettes and greys are
    converted as Pillow does, without colour profiles; transparency is dropped, as transformers
    and vLLM do.

    Raises:
        BadImage: empty, truncated, not an image, animated, or too large; says which.
    """
    if not data:
        raise BadImage("is empty (zero bytes)", where=where)
    if len(data) > MAX_BYTES:
        raise BadImage(f"has {len(data)} bytes", expected=f"at most {MAX_BYTES}", where=where)
    try:
        image = Image.open(io.BytesIO(data))
        _check_header(image, where)
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise BadImage("is not an image that Pillow knows", where=where) from None
    except Image.DecompressionBombError:
        raise _too_large("more pixels than Pillow opens", where) from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise BadImage(f"cannot be decoded ({str(error)[:120]})", where=where) from None


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
        made = image.resize(side, _RESAMPLING[self.resample], box=box)
        return np.ascontiguousarray(np.asarray(made, dtype=np.uint8).transpose(2, 0, 1))

    def facts(self) -> dict[str, Any]:
        """JSON for a plan."""
        return asdict(self)


def _check_header(image: Image.Image, where: str) -> None:
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        raise BadImage(
            f"is animated ({frames} frames)",
            where=where,
            remedy="Save the frame that the text is about as a picture of its own.",
        )
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(f"{image.width} x {image.height} pixels", where)


def _too_large(found: str, where: str) -> BadImage:
    remedy = "Resize it before preparing the corpus."
    return BadImage(found, expected=f"at most {MAX_PIXELS} pixels", where=where, remedy=remedy)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no fixed range")
    return image.convert("RGB")


def _centre(width: int, height: int) -> tuple[float, float, float, float]:
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return (left, top, left + side, top + side)
