"""Image files as pixels: one rule for everything that looks at an image.

One idea: bytes are kept as they came and named by their sha256; wherever pixels are needed they are
decoded here, whole, upright (EXIF) and in RGB, so that every engine sees the same picture. What a
model makes of the pixels is its processor's business.
"""

import hashlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.cache_schemas.errors import CorpusError

ReadImage = Callable[[str], bytes]
"""sha256 -> bytes of the image file, such as `Corpus.image_bytes`."""

MAX_PIXELS = 1 << 26
"""About 67 megapixels: more than common cameras have, less than what exhausts memory."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class BadImage(CorpusError):
    """Bytes that are not one picture of a sensible size."""


def decode_image(data: bytes, where: str) -> Any:
    """A PIL image, upright, RGB, fully read.

    16-bit greys keep their high byte; CMYK, palettes and greys are converted as Pillow does,
    without colour profiles; transparency is dropped, as transformers and vLLM do.

    Raises:
        BadImage: the bytes are none, or no image, or only the beginning of one, or an animation,
            or the header promises an unreasonable size (found before pixels are unpacked).
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not data:
        raise BadImage("is empty (zero bytes)", where=where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as opened:
                _check_header(opened, where)
                opened.load()
                return _to_rgb(ImageOps.exif_transpose(opened), where)
    except UnidentifiedImageError:
        raise BadImage(
            f"is not an image ({len(data)} bytes, beginning {data[:8]!r})",
            expected="PNG, JPEG, WebP or another format that Pillow reads",
            where=where,
        ) from None
    except Image.DecompressionBombError:
        raise _too_large("has more pixels than Pillow opens", where) from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise BadImage(
            f"is damaged or cut short ({str(error)[:120]})",
            where=where,
            remedy="Get the file again.",
        ) from None


def _check_header(image: Any, where: str) -> None:
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        remedy = "Save the frame that the text is about as a picture of its own."
        raise BadImage(f"is animated ({frames} frames)", where=where, remedy=remedy)
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(f"has {image.width} x {image.height} pixels", where)


def _too_large(found: str, where: str) -> BadImage:
    remedy = "Make it smaller before the corpus is prepared."
    return BadImage(found, expected=f"at most {MAX_PIXELS}", where=where, remedy=remedy)


def _to_rgb(image: Any, where: str) -> Any:
    from PIL import Image

    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadImage(f"has pixels without a fixed range (mode {image.mode})", where=where)
    return image.convert("RGB")


class ImageStore:
    """Image files in a directory, each once, under the sha256 of its bytes."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._kept: set[str] = set()

    def path(self, sha256: str) -> Path:
        """Where an image lies: `ab/abcd...`."""
        return self.directory / sha256[:2] / sha256

    def put(self, data: bytes) -> str:
        """Keep an image file; returns its sha256."""
        sha256 = image_sha256(data)
        if sha256 not in self._kept:
            path = self.path(sha256)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            self._kept.add(sha256)
        return sha256


def image_sha256(data: bytes) -> str:
    """The name of an image: hex sha256 over the bytes of its file."""
    return hashlib.sha256(data).hexdigest()
