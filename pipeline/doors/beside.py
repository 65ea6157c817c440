"""What lies beside a student in a trainer's checkpoint: projectors, and what it was trained from.

One idea: projectors hang on the model while it is trained, so that optimiser, DDP and clipping see
them, and are taken off while it is saved or loaded; they lie in a file of their own. A checkpoint
of other caches or objectives is refused by the name of what differs.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from stillroom.cache_schemas.errors import ConfigError, PlanMismatch, StudentError, first_line
from stillroom.pipeline.doors.cached import CachedDataset
from stillroom.pipeline.training.identity import check_identity

IDENTITY = "stillroom.json"
ORDER = "train_dataset"
NAME = "stillroom_projectors"
FILE = "projectors.safetensors"


class SideWeights:
    """Projectors of a trainer's student; nothing happens where there are none.

    Args:
        projectors: by number of the objective.
        trainer: whose model they are trained with.

    Raises:
        ConfigError: the trainer shards its model.
    """

    def __init__(self, projectors: nn.ModuleDict, trainer: Any):
        self._projectors, self._model = projectors, trainer.model
        if not len(projectors):
            return
        if trainer.is_fsdp_enabled:
            raise ConfigError(
                "objectives with projectors under FSDP",
                where=type(trainer).__name__,
                remedy="Train with DDP, leave hidden-state objectives out, or use `stillroom "
                "train` with parallel = 'fsdp'.",
            )
        self._model.add_module(NAME, projectors)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Within it the model is without them."""
        held = self._model._modules.pop(NAME, None)
        try:
            yield
        finally:
            if held is not None:
                self._model._modules[NAME] = held

    def without(self, state: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """A state dict of the model without them."""
        if state is None:
            return None
        return {name: value for name, value in state.items() if f"{NAME}." not in name}

    def save(self, directory: Path) -> None:
        """Write them beside the student."""
        if len(self._projectors):
            state = self._projectors.state_dict()
            save_file(
                {name: t.detach().contiguous() for name, t in state.items()}, directory / FILE
            )

    def load(self, directory: Path) -> None:
        """Fill them from a checkpoint.

        Raises:
            StudentError: they are not there, or of another form.
        """
        if not len(self._projectors):
            return
        try:
            self._projectors.load_state_dict(load_file(directory / FILE))
        except (OSError, RuntimeError) as error:
            raise StudentError(
                f"projectors cannot be read ({first_line(error)})",
                where=str(directory / FILE),
                remedy="Go on from another checkpoint.",
            ) from None


def sign(directory: Path, data: CachedDataset, order: str) -> None:
    """Write what a checkpoint was trained from.

    Args:
        directory: of the checkpoint.
        data: caches and objectives.
        order: of the data set (see `fit.order_of`).
    """
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_identity(data) | {ORDER: order}, indent=2, sort_keys=True)
    (directory / IDENTITY).write_text(text + "\n")


def check_signed(directory: Path, data: CachedDataset, order: str) -> None:
    """Refuse a checkpoint that was trained from something else.

    Args:
        directory: of the checkpoint.
        data: caches and objectives.
        order: of the data set; empty where batches that were seen are not passed over.

    Raises:
        StudentError: it was trained from no cache.
        PlanMismatch: naming what differs.
    """
    if not (directory / IDENTITY).is_file():
        raise StudentError(
            "the checkpoint was not trained from a cache",
            where=str(directory),
            remedy="Load its model, and train that from the first step.",
        )
    found = json.loads((directory / IDENTITY).read_text())
    before = found.pop(ORDER, order)
    check_identity(found, _identity(data), str(directory))
    if order and before != order:
        raise PlanMismatch(
            "was trained on other rows of the cache, or in another order",
            expected="the train_dataset that it was begun with: the rows of the steps that were "
            "taken are passed over by their number",
            where=str(directory),
            remedy="Give that train_dataset, or set ignore_data_skip = True to begin at the first "
            "row of this one.",
        )


def _identity(data: CachedDataset) -> dict[str, Any]:
    """What changes what is learned, flat, so that a difference has a name."""
    found = {f"cache {name or 'cache'}": one.plan.digest for name, one in data.sources.items()}
    for number, line in enumerate(data.lines, 1):
        for key, value in line.model_dump(mode="json").items():
            found[f"objectives[{number}].{key}"] = value
    return found
