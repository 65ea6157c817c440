"""A student trained from caches: steps, ranks, checkpoints, sweeps over students, curves."""
