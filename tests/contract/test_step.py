"""A step's rows scored together say, to the bit, what each request's rows say alone.

Prompts of different lengths, masks and keys share steps, long ones over several (chunked prefill).
"""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from stillroom.pipeline.teacher.rows import RowSpec
from stillroom.pipeline.teacher.step import Share, by_share, on_device, on_host, score_step
from stillroom.pipeline.teacher.sweep.definition import sweep

SPEC = RowSpec(8, 4, (0.5, 1.0), True, True, 0)
WIDTH, VOCAB = 16, 300
HEAD = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(0))


def head(hidden: torch.Tensor) -> torch.Tensor:
    return hidden @ HEAD.T


def exact_head(hidden: torch.Tensor) -> torch.Tensor:
    """In float64 a sum does not feel how many rows it is made beside, once it is rounded."""
    return (hidden.double() @ HEAD.double().T).float()


class Prompt:
    """Made-up states of a prompt, and what is asked about it."""

    def __init__(self, length: int, first_row: int, stride: int, key: int):
        generator = torch.Generator().manual_seed(key)
        self.length, self.first_row, self.key = length, first_row, key
        self.tokens = torch.randint(0, VOCAB, (length,), generator=generator)
        self.hidden = torch.randn(length, WIDTH, generator=generator)
        self.block = torch.randn(length, WIDTH, generator=generator)
        self.kept = np.arange(first_row, length - 1, stride, dtype=np.int32)

    def share(self, start: int, stop: int, offset: int) -> Share | None:
        first, stop = max(start, self.first_row), min(stop, self.length - 1)
        if first >= stop:
            return None
        kept = self.kept[(self.kept >= start) & (self.kept < stop)]
        targets = self.tokens[first + 1 : stop + 1]
        return Share(self.key, offset - start, first, stop, targets, kept)


def prompts() -> list[Prompt]:
    return [Prompt(30, 0, 2, 7), Prompt(41, 22, 1, 8), Prompt(2, 0, 5, 7), Prompt(19, 4, 3, 9)]


def steps(asked: list[Prompt], budget: int) -> Iterator[list[tuple[Prompt, int, int]]]:
    """(prompt, start, stop) of each step of chunked prefill."""
    at = dict.fromkeys(asked, 0)
    while at:
        left, step = budget, []
        for prompt, start in list(at.items()):
            stop = min(prompt.length, start + left)
            left -= stop - start
            if stop > start:
                step.append((prompt, start, stop))
                at[prompt] = stop
            if stop == prompt.length:
                del at[prompt]
        yield step


def said(asked: list[Prompt], budget: int, logits_fn, block_rows: int, across: bool) -> dict:
    found = {prompt: [] for prompt in asked}
    for step in steps(asked, budget):
        hidden = torch.cat([prompt.hidden[a:b] for prompt, a, b in step])
        block = torch.cat([prompt.block[a:b] for prompt, a, b in step])
        offset, shares = 0, {}
        for prompt, start, stop in step:
            if (share := prompt.share(start, stop, offset)) is not None:
                shares[prompt] = share
            offset += stop - start
        if shares:
            given = list(shares.values())
            states = [block, hidden]
            made = score_step(SPEC, given, hidden, states, logits_fn, block_rows, across)
            for prompt, part in zip(shares, by_share(given, made)):
                found[prompt].append(part)
    return {prompt: [torch.cat(parts) for parts in zip(*own)] for prompt, own in found.items()}


@pytest.mark.parametrize("budget", [9, 50, 1000])
@pytest.mark.parametrize(("logits_fn", "across"), [(head, False), (exact_head, True)])
def test_together_they_say_what_each_says_alone(budget, logits_fn, across):
    asked = prompts()
    together = said(asked, budget, logits_fn, 5, across)
    for prompt in asked:
        rows = torch.arange(prompt.first_row, prompt.length - 1)
        ints, floats, states = together[prompt]
        assert len(ints) == len(floats) == len(rows)
        kept = torch.as_tensor(prompt.kept, dtype=torch.long)
        assert torch.equal(states, torch.stack([prompt.block[kept], prompt.hidden[kept]], 1))
        logits = exact_head(prompt.hidden[rows])
        truth = sweep(logits, prompt.tokens[rows + 1], rows, prompt.key, SPEC)
        torch.testing.assert_close(floats, truth[1], atol=1e-5, rtol=1e-5)
        if across:
            assert torch.equal(ints, truth[0])


@pytest.mark.parametrize("budget", [9, 50, 1000])
def test_on_a_cpu_nothing_depends_on_what_else_the_step_holds(budget):
    """To the bit: the head multiplies the same rows at a time."""
    asked = prompts()
    together = said(asked, budget, head, 5, False)
    pieces = [piece for step in steps(asked, budget) for piece in step]
    for prompt in asked:
        alone = []
        for _, start, stop in (piece for piece in pieces if piece[0] is prompt):
            if (share := prompt.share(start, stop, 0)) is not None:
                hidden, block = prompt.hidden[start:stop], prompt.block[start:stop]
                made = score_step(SPEC, [share], hidden, [block, hidden], head, 5, False)
                alone += by_share([share], made)
        for mine, theirs in zip(together[prompt], map(torch.cat, zip(*alone))):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("across", "blocks"), [(True, [5, 5, 1]), (False, [4, 5, 2])])
def test_full_blocks_hold_rows_of_several_requests(across, blocks):
    asked, seen = [Prompt(5, 0, 1, 1), Prompt(8, 0, 1, 2)], []

    def counting(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(len(hidden))
        return head(hidden)

    said(asked, 1000, counting, 5, across)
    assert seen == blocks


def test_no_states_are_kept_where_no_layer_is_asked_for():
    prompt = Prompt(9, 3, 2, 1)
    share = prompt.share(0, 9, 0)
    assert share is not None
    ints, floats, states = score_step(SPEC, [share], prompt.hidden, [], head, 5, True)
    assert states.shape == (len(prompt.kept), 0, 0)
    assert len(ints) == len(floats) == 5


def test_on_a_cpu_nothing_travels():
    tensor, cpu = torch.arange(3), torch.device("cpu")
    assert on_host([tensor])[0] is tensor
    assert on_device(tensor, cpu) is tensor
    assert on_device(np.arange(3), cpu).tolist() == [0, 1, 2]
