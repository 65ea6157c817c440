"""GRU4Rec (Hidasi et al., ICLR 2016, arXiv 1511.06939): a recurrent net over a history.

One idea: the state after the last item is the user's. Histories come padded on the left and are
moved to the left edge, so that padding is never read before an item.
"""

import torch
from torch import nn

from stillroom.pipeline.config.recommending import Recommender


class GRU4Rec(nn.Module):
    """History of item embeddings -> one state.

    Args:
        table: width, blocks (layers) and dropout.
        length: items of a history.
    """

    def __init__(self, table: Recommender, length: int):
        super().__init__()
        inside = table.dropout if table.blocks > 1 else 0.0
        width = table.width
        self.dropout = nn.Dropout(table.dropout)
        self.gru = nn.GRU(width, width, table.blocks, batch_first=True, dropout=inside)

    def forward(self, embedded: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """States [B, d] of embedded [B, L, d]; present bool [B, L] is False where padding is."""
        length = embedded.shape[1]
        counts = present.sum(dim=1)
        steps = torch.arange(length, device=embedded.device)
        order = (steps + (length - counts)[:, None]) % length
        moved = embedded.gather(1, order[..., None].expand_as(embedded))
        states, _ = self.gru(self.dropout(moved))
        last = (counts - 1).clamp_min(0)
        return states[torch.arange(len(states), device=states.device), last]
