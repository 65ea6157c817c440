"""Weights that the tokens of one rank reach and those of another do not, under FSDP."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn

from stillroom.cache_schemas.errors import StudentError
from stillroom.pipeline.training.checkpoint import trainable
from stillroom.pipeline.training.parallel import Parallel
from tests.ranks import leave


class Experts(nn.Module):
    """Two of one size, each in a module of its own, of which a rank uses the one it is told."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))

    def forward(self, inputs: torch.Tensor, which: int) -> torch.Tensor:
        return self.experts[which](self.shared(inputs)).sum()


def _step(rank: int, folder: str) -> None:
    meeting = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    torch.manual_seed(0)
    module: Any = fully_shard(Experts(), mesh=init_device_mesh("cpu", (2,)))
    two, said = Parallel(rank, 2, torch.device("cpu")), []
    for which in (1, rank):
        module.zero_grad()
        module(torch.ones(3, 4), which).backward()
        try:
            two.check_reached(trainable(module))
            said.append("")
        except StudentError as error:
            said.append(str(error))
    torch.save(said, f"{folder}/{rank}.pt")
    leave()


@pytest.mark.slow
def test_what_fsdp_added_up_of_different_weights_is_refused_on_every_rank(tmp_path):
    """Nothing else tells: one expert's gradient has the size of the other's."""
    spawn(_step, (str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert one == other
    assert one[0] == ""
    assert "2 weights have a gradient on some ranks only (experts.0.weight on 1 of 2)" in one[1]
    assert "Set parallel = 'ddp'" in one[1]
