"""What a small image-text model answers to easy-VQA's questions, and how often it is right.

One idea: an answer is one word, so the most likely next token after the prompt is the answer; task
tokens that a student was trained with stand behind the image, as they did in training.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.data.images import ImageBatch
from pipeline.student import load
from pipeline.student_states import forward_states
from pipeline.vision.small_vlm import IMAGE_TOKENS, Picture, normalise, prompts
from pipeline.vision.student import load_task_tokens

PROMPT = "what is in the image ?"
"""The question under which probes look at a picture."""


@dataclass(frozen=True, slots=True)
class Answers:
    """A model's answers to all questions of some pictures.

    Attributes:
        said: per picture, its answer to each question.
        accuracy: share that is right.
    """

    said: tuple[tuple[str, ...], ...]
    accuracy: float


class Answerer:
    """A model from an HF directory, with its task tokens where it has some."""

    def __init__(self, directory: Path):
        from transformers import AutoTokenizer

        self.model: Any = load(directory).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.task_tokens = load_task_tokens(directory)

    @torch.inference_mode()
    def answer(self, pictures: list[Picture], batch: int = 32) -> Answers:
        """Answer every question of every picture."""
        said: list[tuple[str, ...]] = []
        for start in range(0, len(pictures), batch):
            said += self._answer(pictures[start : start + batch])
        truth = [tuple(answer for _, answer in picture.questions) for picture in pictures]
        pairs = [(a, b) for mine, true in zip(said, truth) for a, b in zip(mine, true, strict=True)]
        return Answers(tuple(said), sum(a == b for a, b in pairs) / len(pairs))

    @torch.inference_mode()
    def states(
        self, pictures: list[Picture], layers: list[int], batch: int = 64
    ) -> dict[int, torch.Tensor]:
        """Layer -> [I, K, D]: states of one fixed prompt for each picture, without task tokens."""
        parts: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
        for start in range(0, len(pictures), batch):
            chosen = pictures[start : start + batch]
            ids, at = prompts(self.tokenizer, [PROMPT] * len(chosen))
            ids = ids[:, : int(at[0]) + 1]
            found = self._forward(ids, chosen, list(range(len(chosen))), layers, tokens=None)
            for layer in layers:
                parts[layer].append(found.blocks[layer].view(*ids.shape, -1).clone())
        return {layer: torch.cat(found) for layer, found in parts.items()}

    def _answer(self, pictures: list[Picture]) -> list[tuple[str, ...]]:
        owner = [n for n, picture in enumerate(pictures) for _ in picture.questions]
        asked = [question for picture in pictures for question, _ in picture.questions]
        ids, at = prompts(self.tokenizer, asked)
        found = self._forward(ids, pictures, owner, [], self.task_tokens)
        places = torch.arange(len(ids)) * ids.shape[1] + at
        logits = self.model.lm_head(found.at(places))
        words = iter(self.tokenizer.convert_ids_to_tokens(logits.argmax(-1).tolist()))
        return [tuple(next(words) for _ in picture.questions) for picture in pictures]

    def _forward(self, ids, pictures: list[Picture], owner: list[int], blocks, tokens):
        """Every row is a prompt about the picture `owner[row]`; rows share a picture's pixels."""
        pixels = normalise(torch.from_numpy(np.stack([picture.pixels for picture in pictures])))
        first = torch.arange(len(ids)) * ids.shape[1]
        images = ImageBatch(
            names=("",) * len(ids),
            keys=first,
            example=torch.arange(len(ids)),
            document=first,
            start=first + 1,
            length=torch.full_like(first, IMAGE_TOKENS),
            pixels=pixels[owner],
        )
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        return forward_states(self.model, ids, positions, blocks, images, tokens)
