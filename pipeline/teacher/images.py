"""What an image-text teacher reads beside tokens: the pictures of an example, and its placeholders.

One idea: a prepared example already holds the placeholders that the processor made of its images.
An engine makes the pixels again from the same bytes with the same processor, and must arrive at
the same placeholders at the same positions; anything else is an example that cannot be answered.
This module runs no model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.images import ReadImage, decode_image
from stillroom.pipeline.record import Example
from stillroom.pipeline.teacher.protocol import RejectedExample


class Pictures:
    """The images of a corpus for an engine.

    Args:
        read: sha256 -> bytes of the image file.
        arguments: passed to the processor, as when the corpus was prepared.
    """

    def __init__(self, read: ReadImage, arguments: Mapping[str, Any] | None = None):
        self.read, self.arguments = read, dict(arguments or {})

    def of(self, example: Example) -> list[Any]:
        """PIL images of an example, in order.

        Raises:
            RejectedExample: one is missing or cannot be decoded.
        """
        return [self._picture(example, span.sha256) for span in example.images]

    def _picture(self, example: Example, sha256: str) -> Any:
        try:
            return decode_image(self.read(sha256), f"image {sha256[:12]}")
        except FileNotFoundError:
            raise RejectedExample(
                example, f"image {sha256[:12]} is missing", remedy="Prepare the corpus again."
            ) from None
        except CorpusError as error:
            raise RejectedExample(example, str(error)) from None


def collapsed(example: Example, placeholder: int) -> list[int]:
    """The example's tokens with one placeholder for each image, as before the processor."""
    tokens, last = [], 0
    for span in example.images:
        tokens += [*example.token_ids[last : span.start].tolist(), placeholder]
        last = span.start + span.length
    return tokens + example.token_ids[last:].tolist()


def check_expansion(
    example: Example, token_ids: Sequence[int], spans: Sequence[tuple[int, int]]
) -> None:
    """Refuse an example whose placeholders an engine makes otherwise.

    Args:
        token_ids: the engine's.
        spans: (start, length) of each image in them.

    Raises:
        RejectedExample: they differ.
    """
    expected = [(span.start, span.length) for span in example.images]
    if list(spans) != expected or not np.array_equal(token_ids, example.token_ids):
        raise RejectedExample(
            example,
            f"the engine's processor puts its images at {list(spans)[:4]} (start, length)",
            expected=f"{expected[:4]}, as the corpus was prepared",
            remedy="Prepare the corpus again with the same [prepare] processor_args and versions.",
        )


def reads_prefixes(config: Any) -> bool:
    """Whether a model's prompt tokens all see each other (PaliGemma's prefix)."""
    return config.model_type == "paligemma"


def image_token(config: Any) -> int:
    """The placeholder's id in a model's config."""
    found = getattr(config, "image_token_id", None)
    return config.image_token_index if found is None else found
