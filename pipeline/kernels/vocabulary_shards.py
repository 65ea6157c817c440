"""Which words a process holds, and how row statistics of all words are put together.

One idea: a head sharded over ranks by rows (words) changes the divergence in three places only: the
log-sum-exps are combined (one max, one sum), the logits of the k ids come from whoever owns
them (in that same sum), and d_hidden is a sum over words (the third all-reduce). With one process
all three do nothing. This module holds no divergence and no matrix product.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Shard:
    """Words `start .. start + width - 1` of `total`.

    Attributes:
        start: first word held here.
        width: number of real words held here; may be 0 on the last ranks.
        total: number of real words over all ranks.
        largest: width of the widest shard; ranks cut rows into chunks by it, so all cut alike.
        group: ranks that hold the other words; None when this process holds all.
    """

    start: int
    width: int
    total: int
    largest: int
    group: dist.ProcessGroup | None = None

    @classmethod
    def whole(cls, words: int) -> "Shard":
        """All words in this process."""
        return cls(0, words, words, words)

    def columns(self, ids: Tensor) -> Tensor:
        """Local column of every id (int64); `width`, the spare column, for all others."""
        local = ids.long() - self.start
        return torch.where((local < 0) | (local >= self.width) | (ids < 0), self.width, local)

    def combine(self, lse: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Log-sum-exps [C, a] and sums [C, b] over all shards, in two all-reduces."""
        if self.group is None:
            return lse, sums
        peak = lse.clone()
        dist.all_reduce(peak, dist.ReduceOp.MAX, group=self.group)
        parts = torch.cat([(lse - peak).exp(), sums], 1)
        dist.all_reduce(parts, group=self.group)
        return peak + parts[:, : lse.shape[1]].log(), parts[:, lse.shape[1] :]

    def sum_(self, tensor: Tensor) -> Tensor:
        """A sum over shards, in place."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor
