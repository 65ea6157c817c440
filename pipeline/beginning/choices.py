"""The settings of a first run, chosen from the data, the teacher and this machine.

One idea: what can be counted is counted (lengths, weights, free memory) and what cannot is left at
its default; times are arithmetic over what was tried here, and are said to be no more than that.
It loads no model.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from stillroom.pipeline.beginning.sampling import Sample
from stillroom.pipeline.beginning.trial import BLOCK, Speeds
from stillroom.pipeline.config import Teacher, Train
from stillroom.pipeline.config.training import Student
from stillroom.pipeline.student.leaving_out import rounds
from stillroom.pipeline.student.memory import numbers_in, room_on
from stillroom.pipeline.teacher.facts import ModelShape, model_directory, model_shape
from stillroom.pipeline.training.memory import parts_of

BYTES_PER_TOKEN = 40
"""Of the default capture, as measured on real text (runbooks/40-cache-sizes.md)."""
EVALUATED = 64
"""Held-out examples that a first run measures."""
STUDENT = Student()
ENGINE_STARTS = 60.0
"""Seconds until vLLM answers, a minute on two cores; more for large teachers."""
LEAST_STEPS, MOST_EPOCHS, MANY_EPOCHS = 100, 10, 4
"""Small data are read again until there are so many steps, but at most so many times; repeats are
worth about as much as fresh text up to four times (arXiv 2305.16264), and more is warned of."""


@dataclass(frozen=True, slots=True)
class Choices:
    """A first run.

    Attributes:
        window: tokens of an example, at most.
        cut: share of the examples that are longer.
        batch_tokens, steps: of training; small data are read several times.
        epochs: how often the data that were looked at are read.
        minutes: stage -> estimate, for the data that were looked at.
        megabytes: of the cache.
        fits: training fits into the memory that is free now.
        tried: minutes follow from passes and steps that were tried here.
    """

    window: int
    cut: float
    batch_tokens: int
    steps: int
    epochs: float
    minutes: Mapping[str, float]
    megabytes: float
    fits: bool
    tried: bool


def choose(
    sample: Sample, teacher: Teacher, kept: float, at: Speeds, leave_out: int = 0
) -> Choices:
    """Settings for a student that keeps a share of the teacher's blocks.

    Args:
        at: what models of the teacher's shape take here.
        kept: share of the blocks, 0 < kept <= 1.
        leave_out: blocks that go, where which ones is measured.
    """
    shape, numbers = model_shape(teacher), numbers_in(model_directory(teacher))
    window = _window(sample, shape)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student = _student_numbers(numbers, kept)
    trained = 0.9 * sample.tokens  # a tenth is held out
    tokens = _few(trained, window, _batch(student, shape, kept, window, device))
    steps = _steps(trained, tokens)
    return Choices(
        window=window,
        cut=sum(length > window for length in sample.lengths) / len(sample.lengths),
        batch_tokens=tokens,
        steps=steps,
        epochs=steps * tokens / max(trained, 1),
        minutes=_minutes(sample, shape.num_layers, kept, steps, tokens, leave_out, at),
        megabytes=trained * BYTES_PER_TOKEN / 1e6,
        fits=_needed(student, shape, kept, tokens) <= room_on(device),
        tried=at.tried,
    )


def _few(trained: float, window: int, most: int) -> int:
    """Tokens of a step: a power of two that leaves enough steps in the epochs allowed."""
    wanted = MOST_EPOCHS * trained / LEAST_STEPS
    return max(window, min(most, 2 ** int(math.log2(max(wanted, 1)))))


def _steps(trained: float, tokens: int) -> int:
    """One epoch, or more where that is few steps."""
    again = min(LEAST_STEPS, math.floor(MOST_EPOCHS * trained / tokens))
    return max(1, math.ceil(trained / tokens), again)


def _window(sample: Sample, shape: ModelShape) -> int:
    """The power of two that 99 % of the examples fit, within the teacher's context."""
    wanted = 2 ** math.ceil(math.log2(max(sample.share(0.99), 128)))
    return min(wanted, shape.context or wanted, 8192)


def _student_numbers(numbers: Mapping[str, int], kept: float) -> dict[str, int]:
    """Weights of a student with the first so many blocks of a teacher."""
    blocks = [int(found[1]) for name in numbers if (found := BLOCK.search(name))]
    left = math.ceil(kept * (max(blocks, default=-1) + 1))
    within = {n: BLOCK.search(n) for n in numbers}
    return {n: c for n, c in numbers.items() if not (at := within[n]) or int(at[1]) < left}


def _needed(student: dict[str, int], shape: ModelShape, kept: float, tokens: int) -> int:
    """Bytes of training, at least."""
    states = tokens * math.ceil(kept * shape.num_layers) * shape.hidden_size
    return sum(parts_of(student, states, Train(precision="float32"), 1).values())


def _batch(student: dict[str, int], shape: ModelShape, kept: float, window: int, device) -> int:
    """Tokens of a microbatch: the largest power of two for which three quarters of the free memory
    suffice ten times over for the states, since a block keeps about that many."""
    room = 0.75 * room_on(device) - _needed(student, shape, kept, 0)
    each = 10 * (_needed(student, shape, kept, 1) - _needed(student, shape, kept, 0))
    most = 16_384 if device.type == "cuda" else 2048
    fitting = 2 ** int(math.log2(max(room / max(each, 1), 1)))
    return max(window, min(most, fitting))


def _minutes(
    sample: Sample, blocks: int, kept: float, steps: int, tokens: int, leave_out: int, at: Speeds
) -> dict[str, float]:
    """Stage -> estimate, of the data that were looked at."""
    left = kept * blocks
    forward, student = at.forward.of(blocks), at.forward.of(left)
    measured = min(0.1 * sample.tokens, EVALUATED * sample.tokens / len(sample.lengths))
    found = {
        "prepare": sample.seconds,
        "capture": ENGINE_STARTS + 0.9 * sample.tokens * forward,
        "student": _skipping(blocks, leave_out, at) * STUDENT.leave_out_tokens * forward,
        "train": steps * (tokens * at.step.of(left) + at.update.of(left)),
        "evaluate": measured * (forward + 2 * student),
    }
    return {stage: seconds / 60 for stage, seconds in found.items() if seconds}


def _skipping(blocks: int, leave_out: int, at: Speeds) -> float:
    """Passes of the whole teacher that the measurement of `leave_out` is worth."""
    head = at.forward.rest / at.forward.block if at.forward.block else 0.0
    return sum(rounds(blocks, leave_out, head)) if leave_out else 0.0
