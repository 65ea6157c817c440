"""Processes that train one student together.

One idea: the trainer is written for one process; this module says who it is, adds numbers up over
all of them and wraps the student. One process is the same code with nothing to add up.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from stillroom.cache_schemas.errors import ConfigError, StillroomError, StudentError
from stillroom.pipeline.config.training import Train
from stillroom.pipeline.kernels.execution import triton_runs_on
from stillroom.pipeline.student.llava import is_multimodal, only_sees
from stillroom.pipeline.student.states import blocks_of, tells_its_routing


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
        """Join the peers that torchrun started, if it did; otherwise stand alone.

        An engine that ran in this process may have left a group of one, which is no peer.

        Raises:
            ConfigError: peers were started in a way that does not let them find each other.
        """
        _check_surroundings(os.environ)
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        _check_group(world_size)
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

    def together(self, work: Callable[[], Any]) -> Any:
        """Let the main process do something while the others wait; all learn what came of it.

        Returns:
            What `work` returned.

        Raises:
            StillroomError: `work` did, in every process.
        """
        outcome = None
        if self.is_main:
            try:
                outcome = work()
            except StillroomError as error:
                outcome = error
        (outcome, *_) = self.gather(outcome)
        if isinstance(outcome, StillroomError):
            raise outcome
        return outcome

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group, if `start` opened it."""
        if self.started and dist.is_initialized():
            dist.destroy_process_group()

    def check_kind(self, train: Train) -> None:
        """Refuse what one process cannot do.

        Raises:
            ConfigError: `parallel` needs peers.
        """
        if train.parallel == "fsdp" and self.world_size == 1:
            raise ConfigError(
                "parallel = 'fsdp' in a single process",
                where="[train]",
                remedy="Start with torchrun --nproc-per-node N -m stillroom.stages train ..., "
                "or use 'ddp'.",
            )

    def check_kernel(self, train: Train) -> None:
        """Refuse kernels that this device has not.

        Raises:
            ConfigError: `kernel` cannot be had here.
        """
        if train.kernel == "triton" and not triton_runs_on(self.device):
            raise ConfigError(
                f"kernel = 'triton' on {self.device.type}",
                where="[train]",
                remedy="Set kernel = 'auto', or train on a CUDA device with Triton installed.",
            )

    def awaits_what_sees(self, distiller: nn.Module, train: Train) -> bool:
        """Whether an image on one rank makes it wait for the others: FSDP adds up one list of
        gradients, which must be as long on all; DDP wants any, and there may be no other."""
        return self.world_size > 1 and (train.parallel == "fsdp" or only_sees(distiller))

    def go_back(self, loss: torch.Tensor, module: Any) -> None:
        """Gradients of a microbatch; none of one that reaches no trained weight, such as a text
        where only what sees is trained.

        Raises:
            StudentError: other ranks may wait for them.
        """
        if loss.requires_grad:
            loss.backward()
            return
        # All know whether a picture is in the step; whom a router chose, each rank for itself.
        if self.world_size > 1 and not only_sees(module):
            raise StudentError(
                "a microbatch of one rank reaches none of the weights that are trained",
                where="[train] freeze",
                remedy="Freeze less, raise batch_tokens, or train in one process.",
            )
        let_go(module)

    def check_reached(self, weights: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Refuse gradients that FSDP has added up one rank's weight to another's: it sends those of
        the weights that have one, end to end, and two lists of one length look alike.

        Raises:
            StudentError: a weight has a gradient on some ranks only; the same one on every rank.
        """
        named = list(weights)
        own = torch.tensor([weight.grad is not None for _, weight in named], dtype=torch.float32)
        ranks = self.sum(own).tolist()
        partly = [(name, n) for (name, _), n in zip(named, ranks) if 0 < n < self.world_size]
        if partly:
            name, count = partly[0]
            raise StudentError(
                f"{len(partly)} weights have a gradient on some ranks only ({name} on {count:g} of "
                f"{self.world_size})",
                expected="the same weights on all, for FSDP",
                where="[train] parallel",
                remedy="Set parallel = 'ddp'. The last good checkpoint is kept.",
            )

    def wrap(self, distiller: Any, train: Train) -> Any:
        """The module to call in training: the same one, or its DDP or FSDP2 form.

        Raises:
            StudentError: FSDP cannot shard one of its weights.
        """
        if train.parallel == "fsdp":
            return self._sharded(distiller, train.precision)
        return distiller if self.world_size == 1 else replicated(distiller)

    def _sharded(self, distiller: Any, precision: str) -> Any:
        _check_shards(distiller)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(self.device.type, (self.world_size,))
        # FSDP would cast whatever goes in, the teacher's log-probabilities and the units' weights
        # among it. Autocast decides what is computed in bf16, as it does under DDP.
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if precision == "bfloat16":
            policy = replace(policy, param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in blocks_of(distiller.model):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(distiller, mesh=mesh, mp_policy=policy)
        return distiller


ALONE = Parallel(0, 1, torch.device("cpu"))
"""A process without peers, on a CPU."""


def replicated(distiller: Any) -> Any:
    """The DDP form of a module; its gradients lie in the buckets that travel, and nowhere else."""
    rows_alone = all(term.spec.unit == "row" for term in distiller.terms)
    # Only rows are in every batch: without positions a projector gets no gradient, without images
    # neither does what sees them, nor experts in modules of their own that no token chose.
    model = distiller.model
    whole = rows_alone and not is_multimodal(model) and not tells_its_routing(model)
    return nn.parallel.DistributedDataParallel(
        distiller,
        find_unused_parameters=not whole,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )


def _check_shards(distiller: nn.Module) -> None:
    """Refuse weights that are a single number, such as the temperature of 'embedding'."""
    whole_ones = [name for name, weight in distiller.named_parameters() if not weight.dim()]
    if whole_ones:
        raise StudentError(
            f"'{whole_ones[0]}' is a single number, which FSDP cannot divide among ranks",
            expected="weights of one axis or more",
            where="[train] parallel",
            remedy="Set parallel = 'ddp'; or leave out the objective that it belongs to, where it "
            "is no weight of the student's.",
        )


def _check_surroundings(told: Mapping[str, str]) -> None:
    """Refuse to train the same run in several processes that know nothing of each other."""
    tasks = int(told.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and "WORLD_SIZE" not in told:
        raise ConfigError(
            f"srun started {tasks} tasks, and each would train this run by itself",
            expected="torchrun in one task per node",
            remedy="Start srun --ntasks-per-node 1 torchrun --nproc-per-node N -m stillroom.stages "
            "train ..., or set WORLD_SIZE=1 where every task trains a run of its own.",
        )
    names = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in told]
    met = dist.is_initialized()  # in their own way, by a file for one
    if int(told.get("WORLD_SIZE", "1")) > 1 and missing and not met:
        raise ConfigError(
            f"WORLD_SIZE = {told['WORLD_SIZE']} without {missing[0]}",
            remedy="Start with torchrun --nproc-per-node N -m stillroom.stages train ..., "
            "or unset WORLD_SIZE.",
        )


def _check_group(world_size: int) -> None:
    """Refuse a group of other processes than the run's: one rank would pass for all."""
    if dist.is_initialized() and dist.get_world_size() != world_size:
        raise ConfigError(
            f"a process group of {dist.get_world_size()}, and WORLD_SIZE says {world_size}",
            expected="a group of all processes that train, or none yet",
            remedy="Train under torchrun, in a process that has run no engine of vLLM.",
        )


def accumulating(module: Any, last: bool) -> Any:
    """Context of one microbatch: gradients travel between ranks only with the last."""
    if hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(last)
    elif hasattr(module, "no_sync") and not last:
        return module.no_sync()
    return nullcontext()


def let_go(module: Any) -> None:
    """Shard again what a forward pass without a backward pass left gathered.

    FSDP keeps the root's weights whole for the backward pass that it expects. Whoever looks at the
    module's parameters before that finds other tensors than the optimiser's.
    """
    for part in module.modules():
        if hasattr(part, "reshard"):
            part.reshard()


def whole(tensor: Any) -> torch.Tensor:
    """A tensor with all its shards (a collective when it has any)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
