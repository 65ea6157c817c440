"""axolotl on a cache: a plugin for its `plugins:` list.

One idea: axolotl keeps its file, its models, adapters, optimisers and launcher; the plugin gives it
the cache's examples for its data set, and its own trainer with `CachedDistillationMixin` before it.
No text is tokenised: `datasets:` is not read.
"""

# pyright: reportMissingImports=false
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from axolotl.common.datasets import TrainDatasetMeta
from axolotl.core.trainers import AxolotlTrainer
from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, ConfigDict

from stillroom.cache_schemas.errors import ConfigError
from stillroom.pipeline.doors.cached import CachedDataset
from stillroom.pipeline.doors.collator import dataset_of
from stillroom.pipeline.doors.heldout_sets import held_out_sets
from stillroom.pipeline.doors.mixin import CachedDistillationMixin
from stillroom.pipeline.doors.settings import UNASKED


class CacheTable(BaseModel):
    """The table `stillroom:` of an axolotl file; keys as of `CachedDistillationMixin`."""

    model_config = ConfigDict(extra="forbid")

    cache: str | list[str]
    objectives: list[str | dict[str, Any]] = ["forward_kl"]
    caches: dict[str, str] = {}
    eval_cache: str | dict[str, str] | None = None
    kernel: str = "auto"
    local_copy: str = ""
    corpus: str = ""
    teacher: str = ""


class AxolotlArguments(BaseModel):
    """What the plugin adds to axolotl's own settings."""

    stillroom: CacheTable


class CachedAxolotlTrainer(CachedDistillationMixin, AxolotlTrainer):
    """axolotl's trainer on a cache.

    Attributes:
        table: keys of the file's table `stillroom:`.
    """

    table: ClassVar[Mapping[str, Any]] = {}
    unasked = UNASKED  # axolotl's are about logits and generated answers

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *,
        data_collator: Any = None,
        eval_data_collator: Any = None,
        eval_dataset: Any = None,
        **more: Any,
    ):
        """Collators and held-out rows that axolotl made are the cache's instead."""
        super().__init__(model, args, **self.table, **more)


class AxolotlPlugin(BasePlugin):
    """`plugins: [stillroom.hf.AxolotlPlugin]`, and a table `stillroom:` that names the cache."""

    def get_input_args(self) -> str:
        return "stillroom.hf.AxolotlArguments"

    def register(self, cfg: Any) -> None:
        """Put a data set's name where axolotl insists on one; it is not read.

        Raises:
            ConfigError: the file names no cache, or a data set of its own.
        """
        if "cache" not in (cfg.get("stillroom") or {}):
            raise ConfigError(
                "no cache is named",
                where="the axolotl file",
                remedy="Add `stillroom: {cache: DIRECTORY-or-URL}`.",
            )
        if cfg.get("datasets") or cfg.get("pretraining_dataset") or cfg.get("test_datasets"):
            raise ConfigError(
                "datasets beside a cache",
                where="the axolotl file",
                remedy="Leave datasets, test_datasets and pretraining_dataset out: the tokens are "
                "the cache's. Held-out text is `stillroom: {eval_cache: ...}`.",
            )
        cfg["datasets"] = [{"path": ".", "type": "completion"}]
        cfg["val_set_size"] = 0

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> TrainDatasetMeta:
        """The cache's examples, by number, and those of the first held-out cache."""
        table = table_of(cfg)
        data = CachedDataset(
            table["cache"], table["objectives"], table["caches"], table["local_copy"]
        )
        held = held_out_sets(table["eval_cache"], data)
        steps = math.ceil(len(data) * (cfg.num_epochs or 1) / cfg.batch_size)
        return TrainDatasetMeta(
            train_dataset=dataset_of(data),
            eval_dataset=next((dataset_of(one.dataset) for one in held.values()), None),
            total_num_steps=min(steps, cfg.max_steps) if cfg.max_steps else steps,
        )

    def get_trainer_cls(self, cfg: Any) -> type[CachedAxolotlTrainer]:
        return type("CachedAxolotlTrainer", (CachedAxolotlTrainer,), {"table": table_of(cfg)})


def table_of(cfg: Any) -> dict[str, Any]:
    """The table `stillroom:` of a configuration that axolotl has read, with every default."""
    return CacheTable.model_validate(dict(cfg.stillroom)).model_dump()
