"""TRL's `SFTTrainer` on a cache.

One idea: SFTTrainer prepares texts, and a cache's are prepared; so preparation is skipped, and what
its config asks for there is refused or already true. The rest of it (PEFT, activation offloading,
checkpoints, cards) is its own.
"""

from typing import Any

from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from stillroom.cache_schemas.errors import ConfigError
from stillroom.pipeline.doors.mixin import CachedDistillationMixin


class CachedSFTTrainer(CachedDistillationMixin, SFTTrainer):
    """TRL's `SFTTrainer` that learns from a cache; see `CachedDistillationMixin`."""

    def __init__(self, model: Any = None, args: Any = None, **more: Any):
        args = SFTConfig() if args is None else args
        if not isinstance(args, SFTConfig):
            raise ConfigError(
                f"args is a {type(args).__name__}",
                expected="an SFTConfig",
                where="CachedSFTTrainer",
                remedy="Take CachedTrainer for TrainingArguments.",
            )
        own: Any = args.dataset_kwargs or {}
        args.dataset_kwargs = {**own, "skip_prepare_dataset": True}
        super().__init__(model, args, **more)
        longest = int(self.data.lengths.max())
        if args.max_length is not None and longest > args.max_length:
            raise ConfigError(
                f"max_length = {args.max_length}, and the cache has an example of {longest} tokens",
                where="SFTConfig",
                remedy="Set max_length = None: an example of a cache is trained on whole.",
            )
