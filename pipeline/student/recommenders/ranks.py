"""Where the item that came stands in a ranking of the whole catalogue, and what that is worth.

One idea: everything measured follows from one number per row, the rank of the target among all
items that are not left out. Equal scores are ranked in the catalogue's order. HR@k is the share of
rows with rank <= k; NDCG@k, with one relevant item, is 1 / log2(1 + rank) of those.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch

from stillroom.cache_schemas.errors import StudentError
from stillroom.pipeline.student.recommenders.model import SequentialRecommender

CUTS = (1, 5, 10, 20)
ROWS = 512
"""Histories scored at a time."""


@torch.no_grad()
def ranks(
    model: SequentialRecommender,
    history: np.ndarray,
    targets: np.ndarray,
    seen: Callable[[int], np.ndarray] | None = None,
) -> np.ndarray:
    """int64 [R]: rank of each target, 1 is best.

    Args:
        history: int64 [R, L], padded with N on the left.
        targets: int64 [R].
        seen: row -> places left out of the ranking; the target itself never is.

    Raises:
        StudentError: a score is not finite.
    """
    device = model.head.weight.device
    was_training = model.training
    model.eval()
    found = []
    for start in range(0, len(targets), ROWS):
        part = torch.from_numpy(history[start : start + ROWS]).to(device)
        scores = model.all_scores(model.states(part)).float().cpu().numpy()
        if not np.isfinite(scores).all():
            raise StudentError("the student's scores are not finite", where="ranking")
        for row in range(len(scores)):
            gone = None if seen is None else seen(start + row)
            found.append(rank_of(scores[row], int(targets[start + row]), gone))
    model.train(was_training)
    return np.array(found, dtype=np.int64)


def rank_of(scores: np.ndarray, target: int, gone: np.ndarray | None = None) -> int:
    """Rank of one item among the scores [N] of those that are not `gone`."""
    own = scores[target]
    before = scores > own
    before[:target] |= scores[:target] == own
    if gone is not None:
        before[gone] = False
    return 1 + int(before.sum())


def measures(rank: np.ndarray, cuts: Iterable[int] = CUTS) -> dict[str, np.ndarray]:
    """`hr@k` and `ndcg@k` of every row, float64 [R]; rank 0 stands for no rank at all."""
    found = {}
    for cut in cuts:
        inside = (rank >= 1) & (rank <= cut)
        found[f"hr@{cut}"] = inside.astype(np.float64)
        found[f"ndcg@{cut}"] = np.where(inside, 1 / np.log2(1.0 + np.maximum(rank, 1)), 0.0)
    return found
