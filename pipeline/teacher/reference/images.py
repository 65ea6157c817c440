"""Image-text models under transformers: what their forward needs beside token ids.

One idea: the model's own processor is asked about the images alone; what it makes of their places
must be the placeholders that the example holds, and everything else it returns goes to the model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stillroom.pipeline.record import Example
from stillroom.pipeline.teacher.images import (
    Pictures,
    check_expansion,
    image_token,
    reads_prefixes,
)

OF_THE_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels")


def is_image_text(config: Any) -> bool:
    """Whether transformers knows a model of this config that reads images and writes text."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


class ImageInputs:
    """Makes the inputs of an image-text model.

    Args:
        directory: of the model.
        config: its config.
        pictures: the images.
    """

    def __init__(self, directory: Path, config: Any, pictures: Pictures):
        from transformers import AutoProcessor

        self._processor = AutoProcessor.from_pretrained(directory)
        self._pictures, self._placeholder = pictures, image_token(config)
        self._reads_prefixes = reads_prefixes(config)

    def of(self, example: Example) -> dict[str, torch.Tensor]:
        """Keyword arguments of `forward` for one example, token ids not among them.

        Raises:
            RejectedExample: an image is missing, damaged or becomes other placeholders.
        """
        made = self._process(example)
        self._check(example, made)
        inputs = {name: value for name, value in made.items() if name not in OF_THE_TEXT}
        if "mm_token_type_ids" in made:
            kinds = torch.tensor(example.token_ids == self._placeholder)  # [L]
            inputs["mm_token_type_ids"] = kinds.long()[None]
        if self._reads_prefixes:
            # [L], true from the first target on: before it lies the prefix.
            written = torch.tensor(np.maximum.accumulate(example.loss_mask))
            inputs["token_type_ids"] = written.long()[None]
        return inputs

    def for_model(self, example: Example, model: Any) -> dict[str, torch.Tensor]:
        """`of`, on the device and in the floating dtype of a model."""
        inputs = {name: value.to(model.device) for name, value in self.of(example).items()}
        return {n: v.to(model.dtype) if v.is_floating_point() else v for n, v in inputs.items()}

    def _process(self, example: Example) -> Mapping[str, Any]:
        return self._processor(
            text=["".join([self._processor.image_token] * len(example.images))],
            images=[self._pictures.of(example)],
            add_special_tokens=False,
            return_tensors="pt",
            **self._pictures.arguments,
        )

    def _check(self, example: Example, made: Mapping[str, Any]) -> None:
        """The images' tokens end to end are the spans' tokens end to end."""
        spans = [(span.start, span.length) for span in example.images]
        held = [example.token_ids[start : start + length] for start, length in spans]
        found = made["input_ids"][0].numpy()
        if self._reads_prefixes:  # an empty prefix follows the images
            found = found[found == self._placeholder]
        if not np.array_equal(found, np.concatenate(held)):
            check_expansion(example, found, [(0, len(found))])
