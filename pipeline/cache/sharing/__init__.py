"""Caches that come from caches: push and pull, the hub, signatures, merge, subset, reshard."""
