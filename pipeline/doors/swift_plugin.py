"""ms-swift on a cache: what a file for its `--external_plugins` calls.

One idea: ms-swift keeps its command line, its models, tuners, optimisers and checkpoints; its
trainer of causal language models is replaced by the same with `CachedDistillationMixin` before it.
No text is tokenised: `--dataset stillroom` is a name for the cache's own examples.
"""

# pyright: reportMissingImports=false
from collections.abc import Sequence
from typing import Any, ClassVar

from datasets import Dataset
from swift.dataset import DatasetLoader, DatasetMeta, register_dataset
from swift.trainers import Seq2SeqTrainer, TrainerFactory

from stillroom.pipeline.doors.cached import CachedDataset, Objectives
from stillroom.pipeline.doors.mixin import CachedDistillationMixin
from stillroom.pipeline.doors.settings import UNASKED

NAME = "stillroom"
"""What `--dataset` is given."""


class KeptCollator(Seq2SeqTrainer):
    """ms-swift's trainer, which makes its own collator, with the one that it is given."""

    def __init__(self, *given: Any, data_collator: Any, **more: Any):
        self._given = data_collator
        super().__init__(*given, **more)

    def _get_data_collator(self, args: Any, template: Any) -> Any:
        return self._given


class CachedSwiftTrainer(CachedDistillationMixin, KeptCollator):
    """ms-swift's `Seq2SeqTrainer` on a cache.

    Attributes:
        table: what `CachedDistillationMixin` takes beside model and arguments.
    """

    table: ClassVar[dict[str, Any]] = {}
    unasked = UNASKED  # ms-swift's are about logits, its own rows and generated answers

    def __init__(self, train_dataset: Any = None, eval_dataset: Any = None, **more: Any):
        """The rows that ms-swift made stand for the cache's, and are not read."""
        super().__init__(**self.table, **more)


class Stand(DatasetLoader):
    """One row for ms-swift to show and count, which no step reads."""

    def load(self, *given: Any, **more: Any) -> Dataset:
        turns = [{"role": "user", "content": "-"}, {"role": "assistant", "content": "-"}]
        return Dataset.from_list([{"messages": turns}])


def distil_in_swift(
    cache: str | Sequence[str], objectives: Objectives = ("forward_kl",), **more: Any
) -> None:
    """Have `swift sft --dataset stillroom` train on a cache; called in a file for
    `--external_plugins`.

    Args:
        cache, objectives, more: as of `CachedDistillationMixin`: caches, eval_cache, kernel,
            local_copy, corpus, teacher.

    Raises:
        StillroomError: there is no such cache, or an objective cannot be learned from it.
    """
    CachedDataset(cache, objectives, more.get("caches") or {}, more.get("local_copy", ""))
    CachedSwiftTrainer.table = {"cache": cache, "objectives": objectives, **more}
    kind = CachedSwiftTrainer
    TrainerFactory.TRAINER_MAPPING["causal_lm"] = f"{kind.__module__}.{kind.__qualname__}"
    register_dataset(DatasetMeta(dataset_name=NAME, loader=Stand), exist_ok=True)
