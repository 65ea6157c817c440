"""Made-up pictures: smooth and random by seed, as objects, as image files, with questions beside.

One idea: whatever reads pictures in a test reads the same ones, so a seed means one picture.
"""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

QUESTIONS = (("what shape is in the image ?", "circle"), ("is there a red shape ?", "yes"))
"""Asked about every picture of `save_questions`, with the answers."""


def picture(seed: int = 0, size: tuple[int, int] = (40, 30), grain: int = 5) -> Image.Image:
    """A smooth random picture of `size` pixels, drawn from `grain` x `grain` colours."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (grain, grain, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def file(image: Image.Image, form: str = "PNG", **options) -> bytes:
    """A picture as the bytes of an image file."""
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def save_questions(directory: Path, split: str, count: int, first_seed: int = 0) -> None:
    """`split.jsonl` in the form of easy-VQA: QUESTIONS about `count` pictures beside it."""
    (directory / split).mkdir(parents=True)
    with (directory / f"{split}.jsonl").open("w") as lines:
        for number in range(count):
            name = f"{split}/{number}.png"
            picture(first_seed + number, (64, 64)).save(directory / name)
            for turns in QUESTIONS:
                said = zip(("user", "assistant"), turns, strict=True)
                messages = [{"role": role, "content": text} for role, text in said]
                lines.write(json.dumps({"messages": messages, "image": name}) + "\n")
