"""What a list of candidates may hold, whoever wrote it.

One idea: a place in the catalogue is trained on like a token id, so it is checked like one whenever
a record is written or read. It knows no catalogue but its size.
"""

import numpy as np

from stillroom.cache_schemas.errors import ShardCorrupt


def check_ids(ids: np.ndarray, count: int, items: int) -> None:
    """Refuse a list that is not `count` distinct places of a catalogue, padded with -1 at its end.

    Raises:
        ShardCorrupt: saying what it is.
    """
    if ids.shape != (count,):
        raise ShardCorrupt(f"candidate_ids has shape {list(ids.shape)}", expected=f"[{count}]")
    used = int((ids >= 0).sum())
    if (ids[:used] < 0).any() or (ids[used:] != -1).any() or (ids >= items).any():
        raise ShardCorrupt(
            "candidate_ids names places outside the catalogue",
            expected=f"0 to {items - 1}, then -1",
        )
    if len(np.unique(ids[:used])) < used:
        raise ShardCorrupt("candidate_ids names an item twice")


def check_distances(distances: np.ndarray, count: int) -> None:
    """Refuse distances that do not rise, or are not numbers; infinite ones are padding.

    Raises:
        ShardCorrupt: saying what they are.
    """
    if distances.shape != (count,):
        found = f"candidate_distances has shape {list(distances.shape)}"
        raise ShardCorrupt(found, expected=f"[{count}]")
    if np.isnan(distances).any() or (distances < 0).any() or (distances[1:] < distances[:-1]).any():
        raise ShardCorrupt("candidate_distances does not rise from 0", expected="a sorted list")
