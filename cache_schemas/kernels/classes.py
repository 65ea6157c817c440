"""Loops over ranking classes (`cache_schemas.rankings`): choose a row's, count a class's ids."""

import numpy as np

from stillroom.cache_schemas.kernels import compiled

MOST_IDS = 256


@compiled
def cheapest(ids, cost, classes):
    """Class [R] that codes a row's ids [R, k] most cheaply; cost is uint8 [vocab, classes].

    Only the first MOST_IDS count, so that sums stay within 16 bits. Ids are added four at a time,
    which touches the sums a quarter as often.
    """
    num_ids, num_classes = min(ids.shape[1], MOST_IDS), np.uint64(cost.shape[1])
    total = np.empty(num_classes, dtype=np.uint16)
    for t in range(ids.shape[0]):
        total[:] = 0
        row, r = ids[t], 0
        while r < num_ids:
            if r + 4 <= num_ids and min(row[r], row[r + 1], row[r + 2], row[r + 3]) >= 0:
                first, second, third, fourth = (
                    cost[row[r]],
                    cost[row[r + 1]],
                    cost[row[r + 2]],
                    cost[row[r + 3]],
                )
                for c in range(num_classes):
                    pair = np.uint16(first[c]) + np.uint16(second[c])  # two bytes' sum is no byte
                    total[c] += pair + np.uint16(third[c]) + np.uint16(fourth[c])
                r += 4
                continue
            if row[r] >= 0:
                first = cost[row[r]]
                for c in range(num_classes):
                    total[c] += np.uint16(first[c])
            r += 1
        classes[t] = np.argmin(total)


@compiled
def tally(ids, classes, counts):
    """Add the ids [R, k] of rows in a class to counts [vocab, classes]."""
    for t in range(ids.shape[0]):
        for r in range(ids.shape[1]):
            if ids[t, r] >= 0:
                counts[ids[t, r], classes[t]] += 1
