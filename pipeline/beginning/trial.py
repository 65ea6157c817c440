"""How fast models of a teacher's shape are on this machine, tried.

One idea: time is linear in the number of blocks, so two models of random weights, one of a single
block and one whose blocks weigh as much as the rest, tell what a block costs and what all the rest
does (embedding, head, loss, optimiser): the passes and steps that are timed are those of training.
Where they cannot be made, time is reckoned from the speed of a matrix product. No weights are read.
"""

import copy
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stillroom.cache_schemas.errors import StillroomError
from stillroom.pipeline.config import Teacher, Train
from stillroom.pipeline.kernels.topk_divergence import topk_divergence
from stillroom.pipeline.student.layer_lists import keep_layers
from stillroom.pipeline.student.memory import numbers_in, room_on
from stillroom.pipeline.student.states import forward_states
from stillroom.pipeline.teacher.facts import model_config, model_directory, model_shape
from stillroom.pipeline.training.optimization import optimizer_of

Clock = Callable[[], float]
BLOCK = re.compile(r"\.(\d+)\.")
"""The number of a block in the name of a weight."""
SHAPE = (2, 128)
"""Texts and tokens of each, of a trial."""
K, DRAWS = 12, 28
"""Ids and draws of a row, about those of a default capture."""
TRIES = 3
"""After one that only warms up; the faster counts, so that other work counts for little."""
PER_WEIGHT = {"forward": 2, "step": 6}
"""Operations per token and weight: a forward pass; a forward and a backward pass."""
UNMADE = (AttributeError, TypeError, ValueError, RuntimeError)
"""What transformers raises where it cannot make a model of its config alone."""
BYTES_PER_WEIGHT = 16
"""Weight, gradient and two moments in float32."""


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds of a model, as a function of its blocks.

    Attributes:
        rest: of all but the blocks.
        block: of each.
    """

    rest: float
    block: float

    def of(self, blocks: float) -> float:
        """Seconds of a model of so many blocks."""
        return self.rest + blocks * self.block


@dataclass(frozen=True, slots=True)
class Speeds:
    """What models of one shape take here.

    Attributes:
        forward: a token's forward pass with its log-probabilities.
        step: a token's forward and backward pass in training.
        update: the optimiser, once a step.
        tried: measured on such models; else reckoned from a matrix product.
    """

    forward: Line
    step: Line
    update: Line
    tried: bool = True


def speeds(teacher: Teacher, clock: Clock = time.perf_counter) -> Speeds:
    """Try models of a teacher's shape, or reckon where that cannot be done.

    Args:
        teacher: whose config and sizes of weights are read.
        clock: seconds; another in tests.
    """
    numbers = numbers_in(model_directory(teacher))
    depth, every = model_shape(teacher).num_layers, sum(numbers.values())
    block = sum(count for name, count in numbers.items() if BLOCK.search(name)) / depth
    rest = every - depth * block
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fitting = (room_on(device) / 2 / BYTES_PER_WEIGHT - rest) / max(block, 1)
    many = int(min(depth, 1 + math.ceil(rest / max(block, 1)), fitting))
    if many < 2:
        return reckoned(rest, block, operations_per_second())
    try:
        one, more = (_trial(teacher, blocks, device, clock) for blocks in (1, many))
    except (StillroomError, ImportError, LookupError, *UNMADE):
        return reckoned(rest, block, operations_per_second())
    forward, step, update = (_line(few, long, many - 1) for few, long in zip(one, more))
    return Speeds(forward, step, update)


def _line(one: float, more: float, further: int) -> Line:
    """Through the seconds of a model of one block, and of one with so many further ones."""
    block = max(0.0, more - one) / further
    return Line(max(0.0, one - block), block)


def reckoned(rest: float, block: float, speed: float) -> Speeds:
    """Arithmetic over the weights of a block and of the rest, at so many operations a second."""
    forward, step = (
        Line(each * rest / speed, each * block / speed) for each in PER_WEIGHT.values()
    )
    return Speeds(forward, step, Line(0.0, 0.0), tried=False)


def _trial(
    teacher: Teacher, blocks: int, device: torch.device, clock: Clock
) -> tuple[float, float, float]:
    """Seconds of a token's forward pass and step, and of an update."""
    model, tokens = _model(teacher, blocks).to(device), SHAPE[0] * SHAPE[1]
    given = _Given(model, device)
    optimizer = optimizer_of(list(model.parameters()), Train())

    def update() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    forward = _seconds(given.forward, device, clock)
    step = _seconds(given.step, device, clock)
    return forward / tokens, step / tokens, _seconds(update, device, clock)


def _model(teacher: Teacher, blocks: int) -> Any:
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model_config(teacher))
    keep_layers(config.get_text_config(), range(blocks))
    with torch.random.fork_rng():
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


class _Given:
    """Random text and random teacher's answers for a model."""

    def __init__(self, model: Any, device: torch.device):
        self._model, self._device = model, device
        width = model.get_output_embeddings().weight.shape[0]
        rows = SHAPE[0] * SHAPE[1]
        ranks = torch.arange(rows * (K + DRAWS), device=device).view(rows, -1) % width  # distinct
        self._ids = ranks[:, :1].reshape(SHAPE)
        self._places = torch.arange(SHAPE[1], device=device).expand(SHAPE)
        self._top, self._tail = ranks[:, :K], ranks[:, K:]
        self._logprobs = torch.full(self._top.shape, 0.5 / K, device=device).log()
        self._weights = torch.full(self._tail.shape, 0.5 / DRAWS, device=device)

    def _states(self):
        return forward_states(self._model, self._ids, self._places, packed=False)

    @torch.inference_mode()
    def forward(self) -> None:
        """Log-probabilities of every row."""
        with self._autocast():
            states = self._states()
            states.head.logits(states.final).float().log_softmax(-1)

    def step(self) -> None:
        """Loss and gradients."""
        with self._autocast():
            states = self._states()
            rows = topk_divergence(
                states.final,
                states.head.weight,
                self._top,
                self._logprobs,
                tail="sampled",
                tail_ids=self._tail,
                tail_weights=self._weights,
                labels=self._ids.flatten(),
                ce_weight=0.1,
                impl="triton" if self._device.type == "cuda" else "chunked",
            )
        rows.mean().backward()

    def _autocast(self) -> Any:
        return torch.autocast("cuda", torch.bfloat16, enabled=self._device.type == "cuda")


def _seconds(work: Callable[[], object], device: torch.device, clock: Clock) -> float:
    work()
    return min(_once(work, device, clock) for _ in range(TRIES))


def _once(work: Callable[[], object], device: torch.device, clock: Clock) -> float:
    started = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - started


def operations_per_second(width: int = 1024, tries: int = 9) -> float:
    """Of a matrix product on this machine, in the arithmetic that training would use; half of it,
    as models reach about that. The best of some tries, so that other work counts for little."""
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    matrix = torch.ones(width, width, device="cuda" if cuda else "cpu", dtype=dtype)
    times = (_once(lambda: matrix @ matrix, matrix.device, time.perf_counter) for _ in range(tries))
    return 2 * width**3 / min(times) / 2
