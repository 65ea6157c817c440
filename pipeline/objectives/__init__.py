"""Losses a student can learn from a cache; importing this package registers all of them."""

from stillroom.pipeline.objectives import (  # noqa: F401
    alignment,
    balancing,
    divergence,
    embedding,
    policy,
    recommending,
    reconstruction,
)
