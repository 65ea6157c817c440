"""`transformers.Trainer` on a cache."""

from typing import Any

from transformers import Trainer

from stillroom.cache_schemas.errors import ConfigError
from stillroom.pipeline.doors.mixin import CachedDistillationMixin


class CachedTrainer(CachedDistillationMixin, Trainer):
    """`transformers.Trainer` that learns from a cache; see `CachedDistillationMixin`."""

    def __init__(self, model: Any = None, args: Any = None, **more: Any):
        if model is None or isinstance(model, str):
            raise ConfigError(
                f"model is {model!r}",
                expected="a loaded model",
                where="CachedTrainer",
                remedy="Load it first, by from_pretrained; CachedSFTTrainer takes names.",
            )
        super().__init__(model, args, **more)
