"""Caser (Tang and Wang, WSDM 2018): convolutions over a history as if it were a picture.

One idea: horizontal filters see a few items at a time, whatever their features; vertical ones weigh
all items, feature by feature. The best answer of each horizontal filter over time is kept. The
paper's user embedding is left out, as in DLLM2Rec's students: a user is their history.
"""

import torch
import torch.nn.functional as F
from torch import nn

from stillroom.pipeline.config.recommending import Recommender

HEIGHTS = (2, 3, 4)
"""Items that a horizontal filter sees, as in DLLM2Rec; those longer than a history are left out."""


class Caser(nn.Module):
    """History of item embeddings -> one state.

    Args:
        table: width, filters and dropout.
        length: items of a history.
    """

    def __init__(self, table: Recommender, length: int):
        super().__init__()
        width, filters = table.width, table.filters
        heights = [height for height in HEIGHTS if height <= length] or [1]
        self.horizontal = nn.ModuleList(nn.Conv1d(width, filters, height) for height in heights)
        self.vertical = nn.Linear(length, filters, bias=False)
        self.dropout = nn.Dropout(table.dropout)
        self.join = nn.Linear(filters * (len(heights) + width), width)

    def forward(self, embedded: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """States [B, d] of embedded [B, L, d]; padding is embedded as zeros."""
        features = (embedded * present[..., None]).transpose(1, 2)
        seen = [F.relu(conv(features)).amax(dim=2) for conv in self.horizontal]
        weighed = self.vertical(features).flatten(1)
        return F.relu(self.join(self.dropout(torch.cat([*seen, weighed], dim=1))))
