"""Which of the numbers 0 .. count - 1: one worker's share of them, or a few evenly spread.

One idea: work is numbered (shards, parts, examples), so who does what follows from a number and
needs no agreement. What the numbers stand for is not known here.
"""

import numpy as np


def share_of(count: int, rank: int, world_size: int) -> range:
    """One worker's share, a contiguous run; the shares of all ranks hold every number once."""
    return range(count * rank // world_size, count * (rank + 1) // world_size)


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of the numbers, spread from the first to the last."""
    return np.linspace(0, count - 1, min(count, most)).astype(int).tolist()
