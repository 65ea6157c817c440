"""Which blocks a teacher misses least: what `[student] keep_layers` should not name.

One idea: a block is worth the KL that the teacher's own answers move by when it is skipped, and the
blocks that are left out are taken one at a time, each time the one that is missed least beside
those already gone (ShortGPT, arXiv 2403.03853, ranks once by how little a block turns its input;
here the answers themselves are compared, again after every choice). The first choice tries every
block, each later one only the few that added least when they were tried last: a block that the
teacher cannot do without is not tried again. Nothing is cut here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stillroom.cache_schemas.errors import StudentError
from stillroom.pipeline.record import Example
from stillroom.pipeline.student.partial_passes import PartialPasses, batches
from stillroom.pipeline.student.states import StudentStates, blocks_of

Progress = Callable[[float, float], None]
Measured = Callable[[tuple[int, ...], float], None]
SHORT_LIST = 6
"""Blocks that are tried for every choice after the first; runbooks/70-students.md has figures."""
ROWS_AT_ONCE = 256
"""Rows of logits in memory beside the whole model's probabilities."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """One more block that goes.

    Attributes:
        block: its number, from 0.
        kl: KL(whole model || without this block and those before it), nats per token.
    """

    block: int
    kl: float


@torch.inference_mode()
def least_missed(
    model: Any,
    examples: Sequence[Example],
    count: int,
    on_progress: Progress | None = None,
    known: Mapping[tuple[int, ...], float] | None = None,
    on_measured: Measured | None = None,
) -> list[LeftOut]:
    """The `count` blocks to leave out of a causal LM, in the order in which they are chosen.

    Args:
        model: in memory, evaluating; it is as before afterwards.
        examples: text to judge by; all of their rows count.
        count: below the number of blocks.
        on_progress: told (passes done, in all), in passes of the whole model; of those that are
            known, together, before the first that is not, so that they count as nobody's speed.
        known: what an earlier call measured on the same text: blocks left out, ascending -> KL.
        on_measured: told each of these that is new.

    Raises:
        StudentError: no block would be left.
    """
    depth = len(blocks_of(model))
    if not 0 < count < depth:
        raise StudentError(
            f"{count} blocks to leave out", expected=f"1 to {depth - 1}", where="leave_out"
        )
    judge = _Judge(model, examples, known or {}, on_measured)
    work = _Work(depth, count, judge.head, on_progress)
    gone: list[LeftOut] = []
    last: dict[int, float] = {}  # KL that a block added when it was tried last
    for turn in range(count):
        without, so_far = [left.block for left in gone], gone[-1].kl if gone else 0.0
        tried = _short_list(last, depth) if turn else list(range(depth))
        work.begins(turn, tried, without)
        for number in tried:
            if new := not judge.knows(without, number):
                work.tells()
            last[number] = judge.kl(without, number) - so_far
            work.goes_on(new)
        best = min(tried, key=lambda number: last[number])
        gone.append(LeftOut(best, judge.kl(without, best)))
        del last[best]
    work.tells()
    return gone


def rounds(depth: int, count: int, head: float) -> list[float]:
    """Work of each choice, in passes of the whole model.

    Args:
        depth: blocks of the model.
        count: choices.
        head: work of the head, in blocks.
    """
    tried = [depth, *(min(SHORT_LIST, depth - turn) for turn in range(1, count))]
    # On average half of the blocks that are there lie above the one that is skipped.
    costs = [each * ((depth - turn - 1) / 2 + head) for turn, each in enumerate(tried)]
    return [cost / (depth + head) for cost in costs]


def _short_list(last: Mapping[int, float], depth: int) -> list[int]:
    """The blocks that added least when they were tried last, in their order."""
    return sorted(sorted(last, key=lambda number: last[number])[: min(SHORT_LIST, depth)])


class _Work:
    """How much is done, in passes of the whole model, of a total that is known from the beginning:
    inside a choice by the blocks that each pass computes, over all choices by their mean."""

    def __init__(self, depth: int, count: int, head: float, tell: Progress | None):
        self._depth, self._head, self._tell = depth, head, tell
        self._rounds = rounds(depth, count, head)
        self._done, self._told = 0.0, -1.0

    def begins(self, turn: int, tried: Sequence[int], without: Sequence[int]) -> None:
        """A choice among `tried`, beside the blocks `without`."""
        self._before, self._own = sum(self._rounds[:turn]), self._rounds[turn]
        left = [n for n in range(self._depth) if n not in without]
        self._costs = [self._head + sum(n > number for n in left) for number in tried]
        self._tried = 0

    def goes_on(self, tell: bool) -> None:
        """One more is tried."""
        self._tried += 1
        self._done = self._before + self._own * sum(self._costs[: self._tried]) / sum(self._costs)
        if tell:
            self.tells()

    def tells(self) -> None:
        """Say how far it is, unless that was said."""
        if self._tell is not None and self._done != self._told:
            self._told = self._done
            self._tell(round(self._done, 1), round(sum(self._rounds), 1))


class _Judge:
    """KL of a model to itself without some blocks, each measured once.

    Attributes:
        head: multiplications of the head for the rows of a text, over those of one block.
    """

    def __init__(self, model: Any, examples: Sequence[Example], known, tell: Measured | None):
        self._texts = [_Text(model, group) for group in batches(examples)]
        self._known, self._tell = dict(known), tell
        blocks, head = blocks_of(model), model.get_output_embeddings().weight.numel()
        each = sum(p.numel() for p in blocks.parameters()) / len(blocks)
        tokens = sum(text.passes.tokens for text in self._texts)
        self._rows = sum(len(text.passes.rows) for text in self._texts)
        self.head = head * self._rows / (each * tokens)

    def knows(self, without: Sequence[int], number: int) -> bool:
        """Whether `kl` has nothing to compute."""
        return tuple(sorted([*without, number])) in self._known

    def kl(self, without: Sequence[int], number: int) -> float:
        """Mean over all rows of KL(whole || without those and `number`), nats."""
        key = tuple(sorted([*without, number]))
        if key not in self._known:
            parts = [t.divergence(t.passes.without(without, number)) for t in self._texts]
            self._known[key] = sum(parts) / self._rows
            if self._tell is not None:
                self._tell(key, self._known[key])
        return self._known[key]


class _Text:
    """A batch of texts, and what the whole model says there."""

    def __init__(self, model: Any, examples: Sequence[Example]):
        self.passes = PartialPasses(model, examples)
        self._p: list[Tensor] = []  # [rows, V] each
        self._negentropy = 0.0
        for z in self._logits(self.passes.without(())):
            p = z.softmax(-1)
            self._negentropy += _cross(p, z)
            self._p.append(p)

    def divergence(self, states: StudentStates) -> float:
        """Sum over rows of KL(whole || states), nats."""
        pairs = zip(self._p, self._logits(states))
        return self._negentropy - sum(_cross(p, logits) for p, logits in pairs)

    def _logits(self, states: StudentStates) -> Iterator[Tensor]:
        """float32 [rows, V] of all rows, some at a time."""
        for part in self.passes.rows.split(ROWS_AT_ONCE):
            yield states.head.logits(states.final[part]).float()


def _cross(p: Tensor, logits: Tensor) -> float:
    """Sum over rows and words of p * log softmax(logits)."""
    rows = torch.einsum("nv,nv->n", p, logits) - logits.logsumexp(-1)
    return float(rows.sum(dtype=torch.float64))
