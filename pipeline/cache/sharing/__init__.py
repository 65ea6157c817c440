"""Caches that travel: push and pull, the hub, signatures, partial copies, the card."""
