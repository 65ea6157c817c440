"""Which words a process holds, and how row statistics of all words are put together.

One idea: a head sharded over ranks by rows (words) changes the divergence in three places only: the
peaks of the logits are a max over shards, their exponential sums and the logits of the k ids (which
come from whoever owns them) are one sum, and d_hidden is a sum over words. With one process all
three all-reduces do nothing. This module holds no divergence and no matrix product.

Logits are taken relative to the row's largest before anything is added to them, as log-softmax
does: x - lse has few digits left where x is a thousand.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from stillroom.pipeline.kernels.divergences import LOG_ZERO

FAR_BELOW = -1e30
"""A logit no softmax can see; finite, so that a row made of nothing else gives no NaN."""


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
        here = (ids >= 0) & (local >= 0) & (local < self.width)
        return torch.where(here, local, self.width)

    def max_(self, tensor: Tensor) -> Tensor:
        """A maximum over shards, in place."""
        if self.group is not None:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor

    def sum_(self, tensor: Tensor) -> Tensor:
        """A sum over shards, in place."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor


@dataclass(frozen=True, slots=True)
class ShardStatistics:
    """What one shard knows of a chunk's rows; x are logits over T, z logits at temperature 1.

    Attributes:
        support: [C, k] x of the teacher's words, `FAR_BELOW` where padding or held elsewhere.
        tail_peak, tail_total: [C, 1] largest x outside them, and the sum of exp(x - tail_peak).
        label: [C, 1] z of the label, `FAR_BELOW` where there is none or it is held elsewhere.
        plain_peak, plain_total: [C, 1] the same for z over all words; None where z is x, or
            nobody asks.
    """

    support: Tensor
    tail_peak: Tensor
    tail_total: Tensor
    label: Tensor
    plain_peak: Tensor | None = None
    plain_total: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Student:
    """What all shards know of a chunk's rows.

    Attributes:
        log_q: [C, k + 1] log-probabilities of the outcomes, the tail last.
        tail_share: [C, 1] share of the tail's mass that lies in this shard.
        label_logprob: [C, 1] at temperature 1; meaningless without a label.
        plain_share: [C, 1] share of all mass at temperature 1 that lies in this shard.
    """

    log_q: Tensor
    tail_share: Tensor
    label_logprob: Tensor
    plain_share: Tensor


def combine(shard: Shard, ids: Tensor, local: ShardStatistics) -> Student:
    """Statistics over all words: two all-reduces, or none."""
    top = torch.maximum(local.support.amax(1, keepdim=True), local.tail_peak)
    local_plain = top if local.plain_peak is None else local.plain_peak
    peaks = shard.max_(torch.cat([top, local.tail_peak, local_plain], 1))  # [C, 3]
    top, tail_peak, plain_peak = peaks.split(1, 1)
    tail_part = local.tail_total * (local.tail_peak - tail_peak).exp()  # to the peak of all
    plain_part = torch.zeros_like(tail_part)
    if local.plain_total is not None:
        plain_part = local.plain_total * (local_plain - plain_peak).exp()
    logits = torch.cat([local.support - top, local.label - plain_peak], 1)
    # Nobody but its owner adds a word's logit to the sum.
    logits = logits.masked_fill(logits < FAR_BELOW / 2, 0)
    sums = shard.sum_(torch.cat([logits, tail_part, plain_part], 1))
    support, label, tail_sum, plain_sum = sums.split([ids.shape[1], 1, 1, 1], 1)
    # Nobody owns padding, nor a word beyond the vocabulary: no student gives it anything.
    support = support.masked_fill((ids < 0) | (ids >= shard.total), FAR_BELOW)
    outcomes = torch.cat([support, tail_peak - top + tail_sum.log()], 1)  # [C, k + 1]
    log_q = outcomes.log_softmax(1).clamp(min=LOG_ZERO)
    if local.plain_total is None:
        plain_sum = outcomes.exp().sum(1, keepdim=True)
    return Student(log_q, tail_part / tail_sum, label - plain_sum.log(), plain_part / plain_sum)
