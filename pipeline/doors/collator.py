"""What a trainer of transformers reads of a cache: data set, collator, held-out batches.

One idea: the trainer moves numbers of examples about, and the collator looks the records up, so no
column of teacher's answers can be dropped, cut or reordered on the way. It computes no loss.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stillroom.pipeline.data.batch import NO_LABEL, DistillBatch
from stillroom.pipeline.data.loader import DistillLoader, Geometry
from stillroom.pipeline.doors.cached import CachedBatch, CachedDataset
from stillroom.pipeline.doors.fit import CACHE, EXAMPLE, check_rows, numbers_of
from stillroom.pipeline.objectives.combine import signals_needed
from stillroom.pipeline.training.held_out import HeldOut

DISTILL = "distill"
"""Key of a batch under which the teachers' answers travel."""

COUNTS = "counts"
"""Key of a held-out batch: False where another rank measures it."""


def dataset_of(data: CachedDataset) -> Any:
    """The cache's examples as a `datasets.Dataset`: their numbers, of which cache these are, and
    their lengths in tokens."""
    from datasets import Dataset

    columns = {EXAMPLE: np.arange(len(data)), CACHE: [data.digest] * len(data)}
    return Dataset.from_dict({**columns, "length": data.lengths})


@dataclass
class CachedCollator:
    """Rows that name records of a cache -> inputs of a trainer.

    Gives `input_ids`, `position_ids`, `labels` (int64 [B, S], -100 where the loss mask is not) and
    `distill`, a `CachedBatch`. There is no `attention_mask`. Short examples share a row where
    `data.packed` says that the student keeps them apart.

    Attributes:
        data: the cache.
    """

    data: CachedDataset

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        numbers = numbers_of(rows, len(self.data))
        answers = self.data.__getitems__(numbers)
        check_rows(rows, [one[""] for one in answers], self.data.digest, "a row")
        return inputs_of(self.data.collate(answers))


def inputs_of(batch: CachedBatch) -> dict[str, Any]:
    """A batch as a trainer hands it on."""
    tokens = {"input_ids": batch.host.input_ids, "position_ids": batch.host.position_ids}
    return {**tokens, "labels": labels_of(batch.host), DISTILL: batch}


def labels_of(batch: DistillBatch) -> torch.Tensor:
    """int64 [B, S]: a causal LM's labels; what row t predicts stands at t + 1."""
    labels = torch.full_like(batch.input_ids, NO_LABEL)
    answer = batch.rows.answer
    labels.view(-1)[batch.rows.flat[answer] + 1] = batch.labels[answer]
    return labels


@dataclass
class HeldOutBatches:
    """Every example of a held-out set once over all ranks, as a trainer's loader.

    Attributes:
        dataset: its examples and caches.
        heldout: its objectives.
        geometry: rows of a microbatch, and this rank among the others.
    """

    dataset: CachedDataset
    heldout: HeldOut
    geometry: Geometry

    def __len__(self) -> int:
        rows = len(self._loader().plan.epoch(0))
        return -(-rows // (self.geometry.rows * self.geometry.world_size))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch, counts in self._loader().once():
            made = CachedBatch(batch, batch, self.dataset.lines, self.dataset.facts)
            yield inputs_of(made) | {COUNTS: counts}

    def _loader(self) -> DistillLoader:
        sources = self.heldout.caches
        signals = signals_needed(self.heldout.terms, sources)
        return DistillLoader(sources, signals, self.geometry, pictures=self.dataset.pictures)
