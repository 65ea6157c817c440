"""A recommender: item embeddings, an encoder of histories, and a score for every item.

One idea: the encoder is the only part that differs between kinds. With collaborative embedding
distillation (DLLM2Rec, arXiv 2405.00338) an item's embedding is the student's own plus a learned
projection of the teacher's; that sum is a table, so it is folded into one when the student is
exported and serving costs nothing. As in their code, what scores items is a layer of its own.
"""

from collections.abc import Callable

import torch
from torch import nn

from stillroom.pipeline.config.recommending import Recommender
from stillroom.pipeline.student.recommenders.caser import Caser
from stillroom.pipeline.student.recommenders.gru4rec import GRU4Rec
from stillroom.pipeline.student.recommenders.sasrec import SASRec

ENCODERS: dict[str, Callable[[Recommender, int], nn.Module]] = {
    "sasrec": SASRec,
    "gru4rec": GRU4Rec,
    "caser": Caser,
}


class DistilledPart(nn.Module):
    """weight * W z for every item; z is the teacher's embedding and is not trained.

    Args:
        vectors: float32 [N, width of the teacher].
        width: of the student.
        weight: of this part beside the student's own embedding.
    """

    def __init__(self, vectors: torch.Tensor, width: int, weight: float):
        super().__init__()
        self.projection = nn.Linear(vectors.shape[1], width)
        self.weight = weight
        self.register_buffer("vectors", vectors, persistent=False)

    def forward(self, items: torch.Tensor) -> torch.Tensor:
        """[..., d] of places [...]."""
        vectors: torch.Tensor = self.get_buffer("vectors")
        return self.weight * self.projection(vectors[items])


class SequentialRecommender(nn.Module):
    """Histories in, scores of items out.

    Args:
        table: kind and sizes.
        items: N; place N stands for padding.
        length: items of a history.
        vectors: the teacher's embeddings [N, width], for `[recommender.distilled]`.
    """

    def __init__(
        self, table: Recommender, items: int, length: int, vectors: torch.Tensor | None = None
    ):
        super().__init__()
        self.num_items, self.length = items, length
        self.items = nn.Embedding(items + 1, table.width, padding_idx=items)
        nn.init.normal_(self.items.weight, std=0.01)
        with torch.no_grad():
            self.items.weight[items] = 0
        self.encoder = ENCODERS[table.kind](table, length)
        self.head = nn.Linear(table.width, items)
        self.distilled = None
        if table.distilled is not None and vectors is not None:
            self.distilled = DistilledPart(vectors, table.width, table.distilled.weight)

    def states(self, history: torch.Tensor) -> torch.Tensor:
        """[B, d] of histories int64 [B, L], latest last, padded with N on the left."""
        present = history < self.num_items
        embedded = self.items(history)
        if self.distilled is not None:
            known = history.clamp_max(self.num_items - 1)
            embedded = embedded + self.distilled(known) * present[..., None]
        return self.encoder(embedded, present)

    def scores(self, states: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """[B, K] scores of items int64 [B, K]."""
        weights = self.head.weight[items]
        return (weights @ states[..., None])[..., 0] + self.head.bias[items]

    def all_scores(self, states: torch.Tensor) -> torch.Tensor:
        """[B, N]."""
        return self.head(states)

    @torch.no_grad()
    def folded_table(self) -> torch.Tensor:
        """[N + 1, d]: the student's own embeddings with the distilled part added."""
        table = self.items.weight.detach().clone()
        if self.distilled is not None:
            every = torch.arange(self.num_items, device=table.device)
            for part in every.split(65_536):
                table[part] += self.distilled(part)
        return table


def initial(
    table: Recommender, items: int, length: int, vectors: torch.Tensor | None = None
) -> SequentialRecommender:
    """A recommender with first weights from `table.seed`; the distilled part's are drawn last, so
    that students with and without it begin alike."""
    with torch.random.fork_rng():
        torch.manual_seed(table.seed)
        return SequentialRecommender(table, items, length, vectors)
