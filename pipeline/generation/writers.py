"""Engines that write: answers to prompts with the log probability of every token that was drawn.

One idea: a token is drawn from one stated distribution b, and log b of what was drawn is kept, so
an importance weight needs no model later. b is the mixture a p + (1 - a) q of teacher and student
(MiniLLM, arXiv 2306.08543, section 2.2), both at the given temperature, cut to its nucleus of mass
`top_p` and renormalised. Every draw has its own seed, from the run's, the prompt and the number of
the answer, so that a redo writes the same.

`reference` runs any mixture step by step under transformers. `vllm` runs one model, the teacher
(a = 1) or the student (a = 0), or both and tosses a coin for each token. What the teacher thinks of
the answers, top-k and all, is the business of a capture over the corpus that they become.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from stillroom.cache_schemas.errors import ConfigError
from stillroom.pipeline.config import Generate, Teacher
from stillroom.pipeline.record import Example
from stillroom.pipeline.teacher.images import Pictures
from stillroom.pipeline.teacher.rows import draw_key
from stillroom.pipeline.teacher.sweep.definition import uniforms


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer.

    Attributes:
        token_ids: int32 [n], with the token that ends it, if it ends.
        behaviour_logprob: float32 [n], log b of each, in nats.
        ended: False when it was cut at the longest length.
    """

    token_ids: np.ndarray
    behaviour_logprob: np.ndarray
    ended: bool


class Generator(Protocol):
    """A running writer."""

    def answer(self, prompts: Iterable[Example]) -> Iterator[list[Answer]]:
        """`Generate.n` answers for each prompt, in the order given."""
        ...

    def served(self) -> "Sequence[Served]":
        """Its engines that are not their models' definition."""
        ...

    def close(self) -> None:
        """Give back memory and processes."""
        ...


class Served(Protocol):
    """An engine that writes, as it is asked what it thinks of a text."""

    model: Teacher

    def answer_alone(self, text: Example, sampling: Any) -> Any:
        """vLLM's output for one text while nothing else is asked."""
        ...


@dataclass(frozen=True, slots=True)
class Writers:
    """Who writes, and how.

    Attributes:
        teacher: the teacher.
        settings: the [generate] table.
        stop_ids: tokens that end an answer.
        max_tokens: of a prompt and its answer.
        pictures: images of the prompts.
    """

    teacher: Teacher
    settings: Generate
    stop_ids: tuple[int, ...]
    max_tokens: int
    pictures: Pictures | None = None

    def models(self) -> list[tuple[float, Teacher]]:
        """(share of the mixture, model) of every model with a share.

        Raises:
            ConfigError: a student has a share and none is named.
        """
        share = self.settings.teacher_share
        if share < 1 and not self.settings.student:
            raise ConfigError(
                f"teacher_share = {share:g} leaves {1 - share:g} to a student, and none is named",
                where="[generate] student",
                remedy="Name the student, or set teacher_share = 1.",
            )
        student = Teacher(model=self.settings.student, dtype=self.teacher.dtype)
        student = student.named_by("[generate] student")
        pairs = [(share, self.teacher), (1 - share, student)]
        return [(part, model) for part, model in pairs if part > 0]


def answer_key(seed: int, prompt: Example, number: int) -> int:
    """63-bit key of one answer's draws."""
    return draw_key(seed, f"{prompt.example_id}:{number}")


def mixture(logits: list[tuple[float, torch.Tensor]], settings: Generate) -> torch.Tensor:
    """b: float64 [N, V], rows summing to 1.

    Args:
        logits: (share, [N, V]) of each model.
        settings: temperature and top_p. Temperature 0 puts all mass on the mixture's mode at 1.
    """
    temperature = settings.temperature or 1.0
    # [N, V]
    mixed: Any = sum(share * (z.double() / temperature).softmax(-1) for share, z in logits)
    if settings.temperature == 0:
        return torch.zeros_like(mixed).scatter(1, mixed.argmax(1, keepdim=True), 1.0)
    if settings.top_p < 1:
        falling, ids = mixed.sort(dim=1, descending=True, stable=True)
        outside = falling.cumsum(1) - falling >= settings.top_p  # those before reach it without
        mixed = mixed.scatter(1, ids, falling.masked_fill(outside, 0.0))
    return mixed / mixed.sum(1, keepdim=True)


def draw(b: torch.Tensor, keys: list[int], step: int) -> torch.Tensor:
    """One id per row by inverse CDF in id order: int64 [N].

    Args:
        b: float64 [N, V].
        keys: of each row's answer.
        step: number of the token in its answer.
    """
    cdf = b.cumsum(1)  # [N, V]
    position = torch.tensor([step])
    points = torch.cat([uniforms(position, key) for key in keys])[:, None].to(b.device)
    drawn = torch.searchsorted(cdf, points * cdf[:, -1:], right=True)[:, 0]
    return drawn.clamp_max(b.shape[1] - 1)  # rounding may leave a point beyond the sum
