"""The settings of a first run, chosen from the data, the teacher and this machine.

One idea: what can be counted is counted (lengths, weights, free memory) and what cannot is left at
its default; times are arithmetic over one measured speed, and are said to be no more than that.
It loads no model.
"""

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from stillroom.pipeline.beginning.sampling import Sample
from stillroom.pipeline.config import Teacher, Train
from stillroom.pipeline.config.training import Student
from stillroom.pipeline.student.memory import numbers_in, room_on
from stillroom.pipeline.teacher.facts import ModelShape, model_directory, model_shape
from stillroom.pipeline.training.memory import parts_of

BLOCK = re.compile(r"\.(\d+)\.")
BYTES_PER_TOKEN = 40
"""Of the default capture, as measured on real text (runbooks/40-cache-sizes.md)."""
EVALUATED = 64
"""Held-out examples that a first run measures."""
STUDENT = Student()
PER_WEIGHT = {"capture": 2, "train": 6, "evaluate": 2}
"""Operations per token and weight: a forward pass; a forward and a backward pass."""


@dataclass(frozen=True, slots=True)
class Choices:
    """A first run.

    Attributes:
        window: tokens of an example, at most.
        cut: share of the examples that are longer.
        batch_tokens, steps: of training; one pass over the sampled data, 100 steps at least.
        minutes: stage -> estimate, for the data that were looked at.
        megabytes: of the cache.
        fits: training fits into the memory that is free now.
    """

    window: int
    cut: float
    batch_tokens: int
    steps: int
    minutes: Mapping[str, float]
    megabytes: float
    fits: bool


def choose(sample: Sample, teacher: Teacher, kept: float, leave_out: int = 0) -> Choices:
    """Settings for a student that keeps a share of the teacher's blocks.

    Args:
        kept: share of the blocks, 0 < kept <= 1.
        leave_out: blocks that go, where which ones is measured.
    """
    shape, numbers = model_shape(teacher), numbers_in(model_directory(teacher))
    window = _window(sample, shape)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student = _student_numbers(numbers, kept)
    tokens = _batch(student, shape, kept, window, device)
    trained = 0.9 * sample.tokens  # a tenth is held out
    steps = max(100, math.ceil(trained / tokens))
    return Choices(
        window=window,
        cut=sum(length > window for length in sample.lengths) / len(sample.lengths),
        batch_tokens=tokens,
        steps=steps,
        minutes=_minutes(
            sample,
            sum(numbers.values()),
            sum(student.values()),
            steps * tokens,
            _tried(leave_out, shape.num_layers) * STUDENT.leave_out_tokens,
        ),
        megabytes=trained * BYTES_PER_TOKEN / 1e6,
        fits=_needed(student, shape, kept, tokens) <= room_on(device),
    )


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


def _tried(leave_out: int, blocks: int) -> float:
    """Forward passes of the whole teacher that the measurement of `leave_out` is worth: every block
    that is still there is skipped once for each that goes."""
    return sum((blocks - gone) * (1 - (gone + 1) / blocks) for gone in range(leave_out))


def _minutes(
    sample: Sample, teacher: int, student: int, trained: int, skipped: float
) -> dict[str, float]:
    speed = operations_per_second()
    measured = min(0.1 * sample.tokens, EVALUATED * sample.tokens / len(sample.lengths))
    work = {
        "capture": 0.9 * sample.tokens * teacher * PER_WEIGHT["capture"],
        "student": skipped * teacher * PER_WEIGHT["capture"],
        "train": trained * student * PER_WEIGHT["train"],
        "evaluate": measured * (teacher + 2 * student) * PER_WEIGHT["evaluate"],
    }
    found = {stage: operations / speed / 60 for stage, operations in work.items()}
    return {"prepare": sample.seconds / 60} | {s: m for s, m in found.items() if m}


def operations_per_second(width: int = 1024, tries: int = 9) -> float:
    """Of a matrix product on this machine, in the arithmetic that training would use; half of it,
    as models reach about that. The best of some tries, so that other work counts for little."""
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    matrix = torch.ones(width, width, device="cuda" if cuda else "cpu", dtype=dtype)
    return 2 * width**3 / min(_seconds_of(matrix) for _ in range(tries)) / 2


def _seconds_of(matrix: torch.Tensor) -> float:
    started = time.perf_counter()
    product = matrix @ matrix
    if product.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started
