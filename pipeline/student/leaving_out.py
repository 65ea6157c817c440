"""Which blocks a teacher misses least: what `[student] keep_layers` should not name.

One idea: a block is worth the KL that the teacher's own answers move by when it is skipped, and the
blocks that are left out are taken one at a time, each time the one that is missed least beside
those already gone (ShortGPT, arXiv 2403.03853, ranks once by how little a block turns its input;
here the answers themselves are compared, again after every choice). Nothing is cut here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stillroom.cache_schemas.errors import StudentError
from stillroom.pipeline.record import Example
from stillroom.pipeline.student.sameness import skipped
from stillroom.pipeline.student.states import blocks_of

Progress = Callable[[int, int], None]


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
    model: Any, examples: Sequence[Example], count: int, on_progress: Progress | None = None
) -> list[LeftOut]:
    """The `count` blocks to leave out of a causal LM, in the order in which they are chosen.

    Args:
        model: in memory, evaluating; it is as before afterwards.
        examples: text to judge by; all of their rows count.
        count: below the number of blocks.
        on_progress: told (forward passes done, in all), a pass being over all examples.

    Raises:
        StudentError: no block would be left.
    """
    blocks = list(blocks_of(model))
    if not 0 < count < len(blocks):
        raise StudentError(
            f"{count} blocks to leave out", expected=f"1 to {len(blocks) - 1}", where="leave_out"
        )
    device = next(model.parameters()).device
    tokens = [torch.as_tensor(example.token_ids, dtype=torch.long) for example in examples]
    texts = [ids[None].to(device) for ids in tokens]
    truth = [_logprobs(model, ids) for ids in texts]
    gone: list[LeftOut] = []
    total, done = sum(len(blocks) - n for n in range(count)), 0
    for _ in range(count):
        without = {left.block for left in gone}
        tried = []
        for number in sorted(set(range(len(blocks))) - without):
            with skipped([blocks[n] for n in (*without, number)]):
                tried.append(LeftOut(number, _kl(model, texts, truth)))
            done += 1
            if on_progress is not None:
                on_progress(done, total)
        gone.append(min(tried, key=lambda left: left.kl))
    return gone


def _kl(model: Any, texts: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> float:
    """Mean over all rows of KL(truth || model), nats."""
    total = 0.0
    for ids, p in zip(texts, truth):
        total += float((p.exp() * (p - _logprobs(model, ids))).sum(dtype=torch.float64))
    return total / sum(len(p) for p in truth)


def _logprobs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """float32 [L, V]."""
    return model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
