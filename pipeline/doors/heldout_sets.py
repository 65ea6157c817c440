"""Held-out caches of a trainer: opened and judged before the first step.

One idea: a held-out set is what `stillroom train` makes of one, with the trainer's own objectives.
"""

import warnings
from collections.abc import Mapping
from typing import Any

from stillroom.cache_schemas.errors import ConfigError
from stillroom.pipeline.data.loader import Geometry
from stillroom.pipeline.doors.cached import CachedDataset
from stillroom.pipeline.doors.collator import HeldOutBatches
from stillroom.pipeline.training.held_out import judge

ALONE = Geometry(2, 1)
"""Stands until the student is there."""


def held_out_sets(given: Any, trained: CachedDataset) -> dict[str, HeldOutBatches]:
    """Name -> held-out set; "" where there is one without a name.

    Args:
        given: a location, an opened cache, a `CachedDataset` where there are further caches, or
            several of these by name.
        trained: what is trained on.

    Raises:
        ConfigError: a name is empty.
        PlanMismatch: another teacher than in training, or another measure.
    """
    if given is None:
        return {}
    several = given if isinstance(given, Mapping) else {"": given}
    if isinstance(given, Mapping) and "" in given:
        raise ConfigError("a held-out cache without a name", where="eval_cache")
    return {name: _set(name, one, trained) for name, one in several.items()}


def _set(name: str, given: Any, trained: CachedDataset) -> HeldOutBatches:
    data = given
    where = f"eval_cache '{name}'" if name else "eval_cache"
    if not isinstance(given, CachedDataset):
        _check_alone(trained, where)
        data = CachedDataset(given, trained.lines, corpus=trained.corpus)
    heldout = judge(
        trained.lines,
        name,
        data.sources,
        trained.sources,
        data.facts,
        trained.terms,
        where,
    )
    for note in heldout.notes:
        warnings.warn(note, stacklevel=2)
    return HeldOutBatches(data, heldout, ALONE)


def _check_alone(trained: CachedDataset, where: str) -> None:
    """Refuse one cache where the objectives read several about every text."""
    further = sorted({line.cache for line in trained.lines if line.cache})
    if further:
        told = ", ".join(f"{name!r}: ..." for name in further)
        raise ConfigError(
            f"the objectives also read {', '.join(further)} of every text",
            where=where,
            remedy="Give eval_cache = CachedDataset(held_out, objectives, caches={" + told + "}), "
            "captured from the held-out texts.",
        )


def heldout_batches(found: HeldOutBatches, trainer: Any) -> HeldOutBatches:
    """The set's batches for a trainer's rank."""
    trained, data = trainer.data, found.dataset
    ranks = trainer.accelerator.num_processes
    geometry = Geometry(
        capacity=int(data.lengths.max()),
        rows=trainer.args.per_device_eval_batch_size,
        accumulate=ranks,
        rank=trainer.accelerator.process_index,
        world_size=ranks,
        padding_free=trained.padding_free,
        packed=trained.packed,
    )
    return HeldOutBatches(data, found.heldout, geometry)
