"""Losses a student can learn from a cache; importing this package registers all of them."""

from pipeline.objectives import alignment, divergence, embedding, policy  # noqa: F401
