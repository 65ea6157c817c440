"""Forward passes of a decoder without some of its blocks, computed only from where they differ.

One idea: below the first block that goes nothing changes, so those blocks hand on what they said
before, and a block that goes hands on what it is given; the model's own forward pass drives both.
An architecture whose blocks tell each other more than a state is found by trying, and its passes
are computed whole. Nothing is judged here.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from stillroom.pipeline.record import Example
from stillroom.pipeline.student.sameness import TOLERANCE, skipped
from stillroom.pipeline.student.states import StudentStates, blocks_of, forward_states
from stillroom.pipeline.teacher.reference.head import form_of

FULL = 0.75
"""Texts are padded into one batch where each fills so much of the longest."""


class PartialPasses:
    """Passes over one batch of texts, of a model that is evaluating and is as before after each.

    Args:
        model: a causal LM in memory.
        examples: padded on the right, where no row of a causal model looks.

    Attributes:
        rows: int64 [N], flat positions [B * S] that are no padding.
        tokens: B * S, padding included.
    """

    def __init__(self, model: Any, examples: Sequence[Example]):
        self._model, self._blocks = model, list(blocks_of(model))
        form_of(model)  # measures by passes of its own, which are not to be recorded
        texts = [torch.as_tensor(example.token_ids, dtype=torch.long) for example in examples]
        device = next(model.parameters()).device
        self._ids = nn.utils.rnn.pad_sequence(texts, batch_first=True).to(device)  # [B, S]
        lengths = torch.tensor([len(text) for text in texts])
        inside = torch.arange(self._ids.shape[1]) < lengths[:, None]
        self.rows = inside.flatten().nonzero()[:, 0].to(device)
        self.tokens = self._ids.numel()
        self._said: dict[int, Any] = {}
        self._settled: frozenset[int] | None = None
        self._partial = False
        self._partial = self._agrees()

    def without(self, gone: Collection[int], one: int | None = None) -> StudentStates:
        """States of the pass without the blocks `gone` (0-based) and, beside them, `one`; faster
        for one `gone` with every `one` in turn."""
        every = frozenset(gone) if one is None else frozenset([*gone, one])
        if not self._partial:
            with skipped([self._blocks[n] for n in every]):
                return self._run()
        if one is not None and self._settled != frozenset(gone):
            self.without(gone)
        if one is not None:
            with self._acting(every, one):
                return self._run()
        changed = every if self._settled is None else every ^ self._settled
        first = 0 if self._settled is None else min(changed, default=0)
        with self._acting(every, first), self._recorded():
            found = self._run()
        self._settled = every
        return found

    def _run(self) -> StudentStates:
        places = torch.arange(self._ids.shape[1], device=self._ids.device)[None]
        return forward_states(self._model, self._ids, places, packed=False)

    @contextmanager
    def _acting(self, gone: Collection[int], first: int) -> Iterator[None]:
        """Within it the blocks `gone` are not computed, nor those below `first`."""
        own = [(block, vars(block).get("forward")) for block in self._blocks]
        for number, block in enumerate(self._blocks):
            if number < first:
                block.forward = _says(self._said[number])
            elif number in gone:
                block.forward = _hands_on(self._said.get(number))
        try:
            yield
        finally:
            for block, forward in own:
                if forward is None:
                    vars(block).pop("forward", None)
                else:
                    block.forward = forward

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Within it what every block says is kept."""
        hooks = [block.register_forward_hook(self._keep(n)) for n, block in enumerate(self._blocks)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self, number: int) -> Callable:
        def hook(_module, _given, output):
            self._said[number] = _copied(output)

        return hook

    def _agrees(self) -> bool:
        """Whether a partial pass says what a whole one does, without a block of the middle, after
        one in which every block was given something else."""
        one = len(self._blocks) // 2
        whole = self.without((), one).final
        self._partial = True
        try:
            self.without((), 0)
            partial = self.without((), one).final
        except (TypeError, AttributeError, IndexError, KeyError, RuntimeError, ValueError):
            return False  # what is handed on is not all that the next block wants
        gap, largest = (whole - partial).abs().max(), whole.abs().max()
        return bool(gap <= TOLERANCE * largest.clamp_min(1.0))


def batches(examples: Sequence[Example]) -> list[list[Example]]:
    """Examples in groups of about one length, the longest first."""
    groups: list[list[Example]] = []
    for example in sorted(examples, key=lambda one: -len(one.token_ids)):
        if groups and len(example.token_ids) >= FULL * len(groups[-1][0].token_ids):
            groups[-1].append(example)
        else:
            groups.append([example])
    return groups


def _says(output: Any) -> Callable:
    """A forward pass that hands out a fresh copy: some blocks change their input in place."""
    return lambda *_given, **_named: _copied(output)


def _hands_on(output: Any) -> Callable:
    """A forward pass that says what it is given, in the form of `output`."""

    def forward(*given, **named):
        hidden = given[0] if given else next(iter(named.values()))
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return forward


def _copied(output: Any) -> Any:
    if isinstance(output, tuple):
        return (output[0].clone(), *output[1:])
    return output.clone()
