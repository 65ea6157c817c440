"""What a small image-text model answers to easy-VQA's questions, and how often it is right.

One idea: an answer is one word, so the most likely next token after the prompt is the answer; task
tokens that a student was trained with stand behind the image, as they did in training.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stillroom.pipeline.data.images import ImageBatch
from stillroom.pipeline.student.llava import load_task_tokens
from stillroom.pipeline.student.model import load
from stillroom.pipeline.student.states import forward_states
from stillroom.stages.demos.questions import lay_out, states_of
from stillroom.stages.demos.small_vlm import IMAGE_TOKENS, Picture, features_of, normalise, prompts

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


def blind(train: Sequence[Picture], test: Sequence[Picture]) -> dict[str, float]:
    """Accuracy on `test` without looking: of the most common answer of `train` (`majority`), and of
    the most common answer to each question (`question`)."""
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    for question, answer in _asked(train):
        by_question[question][answer] += 1
    ((majority, _),) = sum(by_question.values(), Counter()).most_common(1)
    usual = {question: counts.most_common(1)[0][0] for question, counts in by_question.items()}
    asked = _asked(test)
    return {
        "majority": sum(answer == majority for _, answer in asked) / len(asked),
        "question": sum(answer == usual.get(question) for question, answer in asked) / len(asked),
    }


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
            found = self._prompt_states(pictures[start : start + batch], layers)
            for layer in layers:
                parts[layer].append(found[layer])
        return {layer: torch.cat(found) for layer, found in parts.items()}

    def _answer(self, pictures: list[Picture]) -> list[tuple[str, ...]]:
        """Task tokens stand behind the picture, as they did in training."""
        pixels = torch.from_numpy(np.stack([picture.pixels for picture in pictures]))
        seen = features_of(self.model, pixels)
        if self.task_tokens is not None:
            repeated = self.task_tokens.expand(len(seen), -1, -1)
            seen = torch.cat([seen, repeated], dim=1)
        questions = [picture.questions for picture in pictures]
        asked = lay_out(self.tokenizer, questions, 1 + seen.shape[1], answered=False)
        user = self.tokenizer.convert_tokens_to_ids("<user>")
        states = states_of(self.model, seen, asked, user)
        logits = self.model.lm_head(states[asked.row, asked.column])
        words = iter(self.tokenizer.convert_ids_to_tokens(logits.argmax(-1).tolist()))
        return [tuple(next(words) for _ in picture.questions) for picture in pictures]

    def _prompt_states(self, pictures: list[Picture], layers: list[int]) -> dict[int, torch.Tensor]:
        ids, at = prompts(self.tokenizer, [PROMPT] * len(pictures))
        ids = ids[:, : int(at[0]) + 1]  # one prompt for all: equal lengths
        pixels = normalise(torch.from_numpy(np.stack([picture.pixels for picture in pictures])))
        first = torch.arange(len(ids)) * ids.shape[1]  # [I], flat place of each document
        images = ImageBatch(
            names=("",) * len(ids),
            keys=first,
            example=torch.arange(len(ids)),
            document=first,
            start=first + 1,  # behind the turn's marker
            length=torch.full_like(first, IMAGE_TOKENS),
            pixels=pixels,
        )
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        found = forward_states(self.model, ids, positions, layers, images)
        return {layer: found.blocks[layer].view(*ids.shape, -1).clone() for layer in layers}


def _asked(pictures: Sequence[Picture]) -> list[tuple[str, str]]:
    return [pair for picture in pictures for pair in picture.questions]
