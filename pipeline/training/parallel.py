"""Processes that train one student together.

One idea: the trainer is written for one process; this module says who it is, adds numbers up over
all of them and wraps the student. One process is the same code with nothing to add up.
"""

import os
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from stillroom.cache_schemas.errors import ConfigError
from stillroom.pipeline.config.training import Train
from stillroom.pipeline.student.states import blocks_of


@dataclass(frozen=True, slots=True)
class Parallel:
    """This process among its peers.

    Attributes:
        rank: 0 to world_size - 1.
        world_size: number of processes.
        device: where this one computes.
        started: this object opened the process group and closes it.
    """

    rank: int
    world_size: int
    device: torch.device
    started: bool = False

    @classmethod
    def start(cls) -> "Parallel":
        """Join the peers that torchrun started, if it did; otherwise stand alone."""
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        started = world_size > 1 and not dist.is_initialized()
        if started:
            # Both, because `sum` adds up CPU tensors.
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        rank = dist.get_rank() if dist.is_initialized() else 0
        return cls(rank, world_size, device, started)

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files which all share."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a CPU tensor over all ranks."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        if self.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value)
        return found

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group, if `start` opened it."""
        if self.started and dist.is_initialized():
            dist.destroy_process_group()

    def wrap(self, distiller: Any, train: Train) -> Any:
        """The module to call in training: the same one, or its DDP or FSDP2 form."""
        if train.parallel == "fsdp":
            return self._sharded(distiller, train.precision)
        if self.world_size == 1:
            return distiller
        whole = all(term.spec.unit == "row" for term in distiller.terms)
        # Only rows are in every batch: without positions or images a projector gets no gradient.
        return nn.parallel.DistributedDataParallel(
            distiller, find_unused_parameters=not whole, broadcast_buffers=False
        )

    def _sharded(self, distiller: Any, precision: str) -> Any:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        if not dist.is_initialized():
            raise ConfigError(
                "parallel = 'fsdp' in a single process",
                where="[train]",
                remedy="Start with torchrun --nproc-per-node N -m stillroom.stages train ..., "
                "or use 'ddp'.",
            )
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        policy = MixedPrecisionPolicy()
        if precision == "bfloat16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in blocks_of(distiller.model):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(distiller, mesh=mesh, mp_policy=policy)
        return distiller


def accumulating(module: Any, last: bool) -> Any:
    """Context of one microbatch: gradients travel between ranks only with the last."""
    if hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(last)
    elif hasattr(module, "no_sync") and not last:
        return module.no_sync()
    return nullcontext()


def whole(tensor: Any) -> torch.Tensor:
    """A tensor with all its shards (a collective when it has any)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
