"""Top-k lists as the cache packs them, short of the entropy code: three bytes an entry.

One idea: a record of profile `small` or `strict` is a stream of variable-length codes that only a
sequential decoder can read; what it yields first is row-parallel again: per row a class and a
first level, per entry a gap between levels and a rank within the class. That is the form a device
takes. Levels become log-probabilities through a table, ranks become ids through the class's list,
in the sweep's registers (`triton.sweep`) or here in torch. A row is 3 k + 16 bytes (4 k + 16 with
ranks above 65,536), against 8 k for int32 ids and fp32 log-probabilities.

A row's `shift` is added to what its table says: it holds the row's normalisation, and at another
temperature its log-sum-exps, log p_T = (log p_1 + lse_1) / T - lse_T.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from stillroom.pipeline.kernels.targets import Targets

if TYPE_CHECKING:  # The kernels run where no cache can be read.
    from stillroom.cache_schemas.lists import Lists
    from stillroom.cache_schemas.rankings import Rankings


@dataclass(frozen=True, slots=True)
class PackedTopk:
    """Rows of packed lists and the tables they share.

    Attributes:
        gaps: uint8 (int32 where one is above 255) [N, k] level minus the level before; 0 first.
        first: int32 [N] level of the first entry, as a place in `table`.
        ranks: int16 holding uint16, or int32 [N, k].
        classes: uint8 [N].
        counts: int32 [N] entries before the padding.
        shift: fp32 [N] added to the log-probabilities.
        scale: factor of the table's log-probabilities: 1 / T.
        table: fp32 [levels] log-probability of every level; several codebooks lie end to end.
        lookup: int32 [V + classes * length] ids by falling frequency, then each class's list.
        length: entries of a class's list; a larger rank is a place in the common order.
        words: V.
    """

    gaps: Tensor
    first: Tensor
    ranks: Tensor
    classes: Tensor
    counts: Tensor
    shift: Tensor
    scale: float
    table: Tensor
    lookup: Tensor
    length: int
    words: int

    ROWS = ("gaps", "first", "ranks", "classes", "counts", "shift")

    @classmethod
    def pack(cls, lists: "Lists", rankings: "Rankings") -> "PackedTopk":
        """A record's lists as a cache codes them (`TeacherCache.lists`), short of the entropy code.

        Args:
            lists: with levels, classes, the codebook's table and each row's shift.
            rankings: the classes.
        """
        k = lists.ids.shape[1]
        inside = np.arange(k) < lists.counts[:, None]
        # Padding repeats the row's first level, so that every level is a place in the table.
        levels = np.where(inside, lists.levels, lists.levels[:, :1]).astype(np.int32)
        gaps = np.where(inside, np.diff(levels, axis=1, prepend=levels[:, :1]), 0)  # [N, k]
        ranks = rankings.ranks[lists.classes[:, None], np.where(inside, lists.ids, 0)]
        narrow = np.uint8 if gaps.max(initial=0) < 256 else np.int32
        return cls(
            gaps=torch.from_numpy(gaps.astype(narrow)),
            first=torch.from_numpy(levels[:, 0].copy()),
            ranks=torch.from_numpy(_signed(ranks)),
            classes=torch.from_numpy(lists.classes.astype(np.uint8)),
            counts=torch.from_numpy(lists.counts.astype(np.int32)),
            shift=torch.from_numpy(-lists.shifts),
            scale=1.0,
            table=torch.from_numpy(np.array(lists.table.logprobs, dtype=np.float32)),
            lookup=torch.from_numpy(rankings.lookup.astype(np.int32)),
            length=rankings.lists.shape[1],
            words=rankings.common.size,
        )

    @classmethod
    def cat(cls, parts: "Sequence[PackedTopk]") -> "PackedTopk":
        """Rows of several records of one cache, one after another; their tables end to end."""
        wide = any(part.gaps.dtype == torch.int32 for part in parts)
        starts = np.cumsum([0, *(len(part.table) for part in parts)])
        parts = [
            replace(
                part,
                first=part.first + int(start),
                gaps=part.gaps.int() if wide else part.gaps,
            )
            for part, start in zip(parts, starts)
        ]
        names = (*cls.ROWS, "table")
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return replace(parts[0], **joined)

    def at_temperature(self, temperature: float, lse_one: Tensor, lse: Tensor) -> "PackedTopk":
        """The lists at another temperature.

        Args:
            temperature: T.
            lse_one, lse: fp32 [N] the teacher's log-sum-exps at 1 and at T.
        """
        shift = (self.shift + lse_one) / temperature - lse
        return replace(self, shift=shift, scale=self.scale / temperature)

    def to(self, device: torch.device | str) -> "PackedTopk":
        """The same on another device."""
        names = (*self.ROWS, "table", "lookup")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, **moved)

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, rows: slice | Tensor) -> "PackedTopk":
        return replace(self, **{name: getattr(self, name)[rows] for name in self.ROWS})

    @property
    def shape(self) -> torch.Size:
        """[N, k]."""
        return self.gaps.shape

    @property
    def row_bytes(self) -> float:
        """Bytes of one row, tables apart."""
        return sum(getattr(self, name).nbytes for name in self.ROWS) / max(len(self), 1)

    def unpack(self) -> tuple[Tensor, Tensor]:
        """(ids int64 [N, k] with -1 for padding, log-probabilities fp32 [N, k])."""
        inside = torch.arange(self.shape[1], device=self.gaps.device) < self.counts[:, None]
        levels = self.first[:, None] + self.gaps.int().cumsum(1)  # [N, k]
        logprobs = self.table[levels] * self.scale + self.shift[:, None]
        ranks = self.ranks.int()
        if self.ranks.dtype == torch.int16:
            ranks = ranks & 0xFFFF  # the uint16 that an int16 holds
        base = self.words + self.classes.int()[:, None] * self.length  # [N, 1]
        places = torch.where(ranks < self.length, base + ranks, ranks - self.length)
        ids = self.lookup[places].long()
        return ids.masked_fill(~inside, -1), logprobs.masked_fill(~inside, -torch.inf)


@dataclass(frozen=True, slots=True)
class PackedTargets:
    """`targets.Targets` whose lists are packed."""

    lists: PackedTopk
    labels: Tensor | None
    weights: Tensor | None

    def __getitem__(self, rows: slice | Tensor) -> "PackedTargets":
        labels = None if self.labels is None else self.labels[rows]
        weights = None if self.weights is None else self.weights[rows]
        return PackedTargets(self.lists[rows], labels, weights)

    def unpack(self) -> Targets:
        """The same with plain lists."""
        return Targets(*self.lists.unpack(), self.labels, self.weights)


def _signed(ranks: np.ndarray) -> np.ndarray:
    """Ranks in the signed dtype of their width, bit for bit."""
    return ranks.view(np.int16) if ranks.dtype == np.uint16 else ranks.astype(np.int32)
