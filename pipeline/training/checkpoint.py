"""Training state on disk: safetensors shards and one JSON, whole or not there.

One idea: a checkpoint is written under a temporary name by every rank through
`torch.distributed.checkpoint` in safetensors form (so that it loads on another number of ranks, and
nothing is ever unpickled), `state.json` is written last, and one rename makes it exist. Old ones
are deleted only after the new one exists.
"""

import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from stillroom.cache_schemas.errors import StudentError
from stillroom.pipeline.data.packing import Position
from stillroom.pipeline.training.parallel import Parallel

# Torch warns of what is meant: one process, so nothing to coordinate.
warnings.filterwarnings("ignore", "torch.distributed is disabled")

STATE = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Best:
    """The lowest value of a held-out measure.

    Attributes:
        value: None before the first measurement.
        step: steps done when it was measured.
        since: measurements after it.
        of: what was measured, and on what; empty in states of before, and where nothing is.
    """

    value: float | None = None
    step: int = 0
    since: int = 0
    of: str = ""

    def after(self, value: float, step: int) -> "Best":
        """The best once `value` has been measured after `step` steps.

        NaN is no value, only a measurement; states of before may hold it, and any number beats it.
        """
        if not math.isnan(value) and (self.value is None or not self.value <= value):
            return Best(value, step, of=self.of)
        return replace(self, since=self.since + 1)

    def among(self, of: str) -> "Best":
        """Itself where it is of the same measure on the same text, else none yet: values of two
        measures are not compared."""
        return replace(self, of=of) if self.of in ("", of) else Best(of=of)


@dataclass(frozen=True, slots=True)
class TrainingState:
    """What the JSON of a checkpoint says.

    Attributes:
        step: optimiser steps done.
        position: where the loader goes on.
        identity: everything that makes the run what it is (see `check_identity`).
        tokens: trained on until here.
        loss: of the last step; None before the first one.
        best: the lowest value of `keep_best` so far.
        moved: weight -> how often the optimiser has moved it, where that is not `step` times.
    """

    step: int
    position: Position
    identity: dict
    tokens: int = 0
    loss: float | None = None
    best: Best = Best()
    moved: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> str:
        """The text of `state.json`."""
        where = {"epoch": self.position.epoch, "row": self.position.row}
        done = {"step": self.step, "tokens": self.tokens, "loss": self.loss}
        done |= {"best": asdict(self.best)}
        # Only where there is something to say: then releases of before read it too.
        done |= {"moved": self.moved} if self.moved else {}
        facts = done | {"position": where, "identity": self.identity}
        return json.dumps(facts, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "TrainingState":
        """Read `state.json`."""
        facts = json.loads(text)
        best = Best(**facts.pop("best", {}))
        return cls(**facts | {"position": Position(**facts["position"]), "best": best})


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: holds `step-00000050` and so on.
        parallel: all ranks write and read together.
        keep_last: how many finished ones stay.
        background: write while training goes on.
    """

    def __init__(self, directory: Path, parallel: Parallel, keep_last: int, background: bool):
        self.directory, self._parallel, self._keep_last = directory, parallel, keep_last
        self._background = background
        self._pending: tuple[Any, Path, TrainingState] | None = None
        # Collectives of a background save must not meet those of training.
        self._group: Any = dist.new_group(backend="gloo") if background and _distributed() else None

    def latest(self) -> Path | None:
        """The newest finished checkpoint."""
        found = sorted(self.directory.glob(f"step-*/{STATE}"))
        return found[-1].parent if found else None  # padded numbers sort by step

    def of_step(self, step: int) -> Path:
        """Where the checkpoint after `step` steps is, or would be."""
        return self.directory / f"step-{step:08d}"

    def holds(self, step: int) -> bool:
        """Whether the checkpoint after `step` steps is there."""
        return (self.of_step(step) / STATE).exists()

    def save(self, state: TrainingState, tensors: dict[str, torch.Tensor]) -> None:
        """Write a checkpoint; in the background its predecessor is finished first.

        Raises:
            StudentError: it cannot be written; the one before it is whole.
        """
        self.finish()
        target = self.of_step(state.step)
        if (target / STATE).exists():
            return
        staging = target.with_suffix(".tmp")
        if self._parallel.is_main:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        self._parallel.barrier()
        writer = HuggingFaceStorageWriter(str(staging), save_distributed=True)
        alone = not _distributed()
        if self._background:
            future = async_save(
                tensors, storage_writer=writer, process_group=self._group, no_dist=alone
            )
            self._pending = (future, target, state)
            return
        with _telling(target):
            save(tensors, storage_writer=writer, no_dist=alone)
        self._commit(target, state)

    def finish(self) -> None:
        """Wait for the background save, if there is one."""
        if self._pending is not None:
            future, target, state = self._pending
            self._pending = None
            with _telling(target):
                future.result()
            self._commit(target, state)

    def load(self, checkpoint: Path, tensors: dict[str, torch.Tensor]) -> TrainingState:
        """Fill `tensors` in place; returns the state beside them.

        Raises:
            StudentError: it is not there, a tensor is missing, or its bytes are damaged.
        """
        if not (checkpoint / STATE).exists():
            raise StudentError("there is no such checkpoint", where=str(checkpoint))
        try:
            state = TrainingState.from_json((checkpoint / STATE).read_text())
            reader = HuggingFaceStorageReader(str(checkpoint))
            load(tensors, storage_reader=reader, no_dist=not _distributed())
        except (CheckpointException, OSError, ValueError, KeyError, TypeError) as error:
            raise StudentError(
                f"cannot be read ({type(error).__name__})",
                where=str(checkpoint),
                remedy="Delete this checkpoint; training goes on from the one before it.",
            ) from error
        return state

    def _commit(self, target: Path, state: TrainingState) -> None:
        self._parallel.barrier()
        if self._parallel.is_main:
            staging = target.with_suffix(".tmp")
            write_durably(staging / STATE, state.to_json())
            staging.rename(target)
            sync_directory(self.directory)
            best = self.of_step(state.best.step)
            for old in sorted(self.directory.glob(f"step-*/{STATE}"))[: -self._keep_last]:
                if old.parent != best:
                    shutil.rmtree(old.parent)
        self._parallel.barrier()


@contextmanager
def _telling(target: Path) -> Iterator[None]:
    """Turn what torch raises when bytes cannot be written (no Exception) into a message."""
    try:
        yield
    except CheckpointException as error:
        reasons = [failure[0] for failure in error.failures.values()]
        reason = next((r for r in reasons if isinstance(r, OSError)), reasons[0])
        raise StudentError(
            f"the checkpoint cannot be written ({reason})",
            where=str(target),
            remedy="Free some space, or put right what it says, and run the same command again; "
            "training goes on from the checkpoint before it.",
        ) from None


def tensors_of(
    distiller: nn.Module, optimizer: torch.optim.Optimizer, ema: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Everything that training changes, by name: weights, moments, averages.

    Moments that do not exist yet are made, so that a fresh optimiser can be filled.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in trainable(distiller):
        held = _held(optimizer, parameter)
        tensors[f"weight.{name}"] = parameter.detach()
        tensors |= {f"{moment}.{name}": held[moment] for moment in MOMENTS}
    return tensors | {f"ema.{name}": average for name, average in ema.items()}


def moved_otherwise(
    distiller: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> dict[str, int]:
    """Weights that AdamW has not moved `step` times, and how often it has: it leaves out those
    without a gradient, such as a vision tower's in a step without a picture."""
    named = trainable(distiller)
    counts = torch.stack([_held(optimizer, parameter)["step"] for _, parameter in named])
    told = zip(named, counts.tolist())  # of all at once: the one time that this waits for a device
    return {name: int(count) for (name, _), count in told if count != step}


def set_moved(distiller: nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState) -> None:
    """Adam's own counts, which correct the bias of its moments."""
    for name, parameter in trainable(distiller):
        _held(optimizer, parameter)["step"].fill_(state.moved.get(name, state.step))


def _held(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """What AdamW keeps of a weight; of one without a gradient until now, what it would begin with:
    it takes a weight that has moments and no count for one that it has met."""
    held = optimizer.state[parameter]
    if not held:
        # Where and as what fused AdamW keeps it.
        held["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        held |= {moment: torch.zeros_like(parameter.detach()) for moment in MOMENTS}
    return held


def trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Named parameters that are trained, tied ones once."""
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def write_durably(path: Path, text: str) -> None:
    """Write a small file that survives a power cut, replacing what was there in one move."""
    staging = path.with_name(path.name + ".part")
    with staging.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    staging.replace(path)


def sync_directory(directory: Path) -> None:
    """Make renames in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _distributed() -> bool:
    return dist.is_initialized()
