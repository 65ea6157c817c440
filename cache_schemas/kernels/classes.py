"""Loops over ranking classes (`cache_schemas.rankings`): choose a row's, count a class's ids."""

import numpy as np

from cache_schemas.kernels import compiled

MOST_IDS = 256


@compiled
def cheapest(ids, cost, classes):
    """Class [R] that codes a row's ids [R, k] most cheaply; cost is uint8 [vocab, classes].

    Only the first MOST_IDS count, so that sums stay within 16 bits.
    """
    num_classes = np.uint64(cost.shape[1])
    total = np.empty(num_classes, dtype=np.uint16)
    for t in range(ids.shape[0]):
        total[:] = 0
        for r in range(min(ids.shape[1], MOST_IDS)):
            if ids[t, r] >= 0:
                row = cost[ids[t, r]]
                for c in range(num_classes):
                    total[c] += np.uint16(row[c])
        classes[t] = np.argmin(total)


@compiled
def tally(ids, classes, counts):
    """Add the ids [R, k] of rows in a class to counts [vocab, classes]."""
    for t in range(ids.shape[0]):
        for r in range(ids.shape[1]):
            if ids[t, r] >= 0:
                counts[ids[t, r], classes[t]] += 1
