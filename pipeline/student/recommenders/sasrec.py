"""SASRec (Kang and McAuley, ICDM 2018, arXiv 1808.09781): self-attention over a history.

One idea: every item looks at those before it; the state at the last one is the user's. As in the
paper, queries are normalised and keys are not, and the feed-forward layer keeps the width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from stillroom.pipeline.config.recommending import Recommender


class SASRec(nn.Module):
    """History of item embeddings -> one state.

    Args:
        table: width, blocks, heads and dropout.
        length: items of a history.
    """

    def __init__(self, table: Recommender, length: int):
        super().__init__()
        self.positions = nn.Parameter(torch.empty(length, table.width))
        nn.init.normal_(self.positions, std=0.01)
        self.dropout = nn.Dropout(table.dropout)
        self.blocks = nn.ModuleList(_Block(table) for _ in range(table.blocks))
        self.norm = nn.LayerNorm(table.width)

    def forward(self, embedded: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """States [B, d] of embedded [B, L, d]; present bool [B, L] is False where padding is."""
        length = embedded.shape[1]
        there = present[..., None]
        x = self.dropout(embedded + self.positions) * there
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        # A padded place sees itself, so that no softmax is over nothing.
        sees = (causal & present[:, None, :]) | torch.eye(length, dtype=torch.bool, device=x.device)
        for block in self.blocks:
            x = block(x, sees[:, None]) * there
        return self.norm(x[:, -1])


class _Block(nn.Module):
    def __init__(self, table: Recommender):
        super().__init__()
        width = table.width
        self.heads, self.dropout = table.heads, table.dropout
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor, sees: torch.Tensor) -> torch.Tensor:
        normed = self.before(x)
        q, k, v = self._split(self.query(normed)), self._split(self.key(x)), self.value(x)
        p = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, self._split(v), sees, p)
        x = self.between(normed + mixed.transpose(1, 2).flatten(2))
        inside = F.dropout(F.relu(self.inner(x)), self.dropout, self.training)
        return x + F.dropout(self.outer(inside), self.dropout, self.training)

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, d] -> [B, heads, L, d / heads]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
