"""`transformers.Trainer` on a cache."""

from transformers import Trainer

from stillroom.pipeline.doors.mixin import CachedDistillationMixin


class CachedTrainer(CachedDistillationMixin, Trainer):
    """`transformers.Trainer` that learns from a cache; see `CachedDistillationMixin`."""
