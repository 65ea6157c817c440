"""The door to a teacher: one protocol, two implementations, one contract suite.

One idea: `vllm` is the one to run; `reference` (transformers, one example at a time) is the truth
it is tested against. The choice is the caller's, and nothing falls back from one to the other.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from stillroom.cache_schemas.errors import ConfigError
from stillroom.pipeline.config import Capture, Teacher
from stillroom.pipeline.teacher.facts import model_shape
from stillroom.pipeline.teacher.images import Pictures
from stillroom.pipeline.teacher.protocol import EngineName, TeacherEngine, check_request


class WritingEngine(TeacherEngine, Protocol):
    """A teacher that scores and also writes."""

    def write(
        self, prompts: Sequence[np.ndarray], max_tokens: int, stop_ids: Sequence[int]
    ) -> list[np.ndarray]:
        """The most probable next token, again and again.

        Args:
            prompts: int32 [L] each.
            max_tokens: of an answer, at most.
            stop_ids: tokens that end it; nothing else does.

        Returns:
            int32 [n] per prompt, with the token that ended it.
        """
        ...


def open_writing_engine(
    name: EngineName,
    teacher: Teacher,
    capture: Capture,
    max_tokens: int,
    batch_scale: float = 1.0,
) -> WritingEngine:
    """Load a teacher that writes too; see `open_engine`."""
    check_request(capture, model_shape(teacher))
    if name == "reference":
        from stillroom.pipeline.teacher.reference.greedy import GreedyReference

        return GreedyReference(teacher, capture)
    from stillroom.pipeline.teacher.vllm.greedy import GreedyVllm

    return GreedyVllm(teacher, capture, max_tokens, batch_scale)


def open_engine(
    name: EngineName,
    teacher: Teacher,
    capture: Capture,
    max_tokens: int = 0,
    batch_scale: float = 1.0,
    pictures: Pictures | None = None,
) -> TeacherEngine:
    """Load a teacher.

    Args:
        name: which implementation.
        teacher, capture: what to load and what to ask.
        max_tokens: tokens of the longest example; 0 stands for the model's whole context.
        batch_scale: share of the usual tokens per step, for a machine that ran out of memory.
        pictures: images of the examples; an image-text model needs them.

    Raises:
        ConfigError: the [capture] table asks what this teacher does not have.
        TeacherError: the model cannot be loaded or served.
    """
    check_request(capture, model_shape(teacher))
    if name == "reference":
        from stillroom.pipeline.teacher.reference.engine import ReferenceEngine

        return ReferenceEngine(teacher, capture, pictures)
    if name == "vllm":
        from stillroom.pipeline.teacher.vllm.engine import VllmEngine

        return VllmEngine(teacher, capture, max_tokens, batch_scale, pictures)
    raise ConfigError(f"unknown engine '{name}'", expected="'vllm' or 'reference'")
