"""AdamW's counts of weights that some steps do not reach, over a checkpoint."""

import json

import pytest
import torch
from torch import nn

from stillroom.pipeline.config.training import Train
from stillroom.pipeline.data.packing import Position
from stillroom.pipeline.training.checkpoint import (
    TrainingState,
    moved_otherwise,
    set_moved,
    tensors_of,
    trainable,
)
from stillroom.pipeline.training.optimization import optimizer_of

STEPS, REACHED = 12, (3, 7, 8)


class Two(nn.Module):
    """Two layers, of which most steps reach the first alone."""

    def __init__(self):
        super().__init__()
        self.always, self.seldom = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, both: bool) -> torch.Tensor:
        found = self.always(torch.ones(2, 3))
        return ((self.seldom(found) if both else found) ** 2).sum()


def fresh() -> tuple[Two, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = Two()
    return module, optimizer_of([weight for _, weight in trainable(module)], Train())


def state_after(step: int, moved: dict[str, int]) -> TrainingState:
    return TrainingState(step, Position(), {}, moved=moved)


def gone_on(module, optimizer, step: int) -> tuple[Two, torch.optim.Optimizer]:
    """A new module and a new optimiser, filled as a checkpoint after `step` steps fills them."""
    text = state_after(step, moved_otherwise(module, optimizer, step)).to_json()
    kept = {name: value.clone() for name, value in tensors_of(module, optimizer, {}).items()}
    other, its = fresh()
    for name, value in tensors_of(other, its, {}).items():
        value.data.copy_(kept[name])
    set_moved(other, its, TrainingState.from_json(text))
    return other, its


def after_all(kept_after: int = -1, anew: bool = False) -> dict[str, torch.Tensor]:
    """Weights after all steps, with a checkpoint after one of them, gone on from or not."""
    module, optimizer = fresh()
    for number in range(STEPS):
        if number == kept_after:
            other = gone_on(module, optimizer, number)
            module, optimizer = other if anew else (module, optimizer)
        module(number in REACHED).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return dict(module.named_parameters())


@pytest.mark.parametrize("kept_after", [0, 1, 3, 4, 8, 11])
@pytest.mark.parametrize("anew", [True, False])
def test_a_checkpoint_changes_no_bit_of_what_follows(kept_after, anew):
    whole, found = after_all(), after_all(kept_after, anew)
    assert [name for name in whole if not torch.equal(whole[name], found[name])] == []


def test_only_other_counts_are_told():
    """So a state of a run whose steps reach every weight is what it was before there were any."""
    module, optimizer = fresh()
    module(False).backward()
    optimizer.step()
    assert moved_otherwise(module, optimizer, 1) == {"seldom.weight": 0, "seldom.bias": 0}
    assert "moved" not in json.loads(state_after(3, {}).to_json())
    set_moved(module, optimizer, TrainingState.from_json(state_after(3, {}).to_json()))
    assert moved_otherwise(module, optimizer, 3) == {}
