"""A decoder of plain torch with the few doors that the trainer asks a student for.

One idea: blocks, a norm and a head, under the names that a model of transformers has, so that the
trainer's own code runs where transformers is not installed. It is no good language model.
"""

from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class Config:
    """What is asked of a student's config."""

    def __init__(self, words: int, width: int, depth: int):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = words, width, depth

    def get_text_config(self) -> "Config":
        return self

    def to_dict(self) -> dict[str, Any]:
        return vars(self)


class Block(nn.Module):
    """Causal attention and a gate, each beside the residual stream."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.norm = heads, nn.RMSNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.wide = nn.Sequential(
            nn.RMSNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        )

    def forward(self, states: Tensor) -> Tensor:  # [B, S, D]
        parts = self.mix(self.norm(states)).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        states = states + self.out(mixed.transpose(1, 2).flatten(2))
        return states + self.wide(states)


class Decoder(nn.Module):
    """Tokens to final states."""

    def __init__(self, config: Config):
        super().__init__()
        width, depth = config.hidden_size, config.num_hidden_layers
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(depth))
        self.norm = nn.RMSNorm(width)

    def forward(self, input_ids: Tensor, **_) -> SimpleNamespace:
        states = self.embedding(input_ids)
        for block in self.blocks:
            states = block(states)
        return SimpleNamespace(last_hidden_state=self.norm(states))


class PlainStudent(nn.Module):
    """A decoder and its head."""

    def __init__(self, words: int, width: int, depth: int):
        super().__init__()
        self.config = Config(words, width, depth)
        self.decoder = Decoder(self.config)
        self.head = nn.Linear(width, words, bias=False)

    def get_decoder(self) -> nn.Module:
        return self.decoder

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, **_) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.decoder(input_ids).last_hidden_state))
