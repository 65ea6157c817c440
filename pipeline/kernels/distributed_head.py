"""Heads that live on several ranks: DTensors sharded over words, and FSDP2.

One idea: two things can be meant by a head whose rows are spread over ranks. Either every rank has
the same rows of hidden states (tensor parallelism): then the divergence itself runs sharded, and
hidden states come as a DTensor replicated over the same mesh. Or every rank has rows of its own
(FSDP2): then the head must be whole while it is used, which FSDP2 does in the forward of a module
it wraps; `DivergenceHead` is that module. Anything in between is refused, not guessed.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as ShardedOver

from stillroom.pipeline.kernels.topk_divergence import topk_divergence
from stillroom.pipeline.kernels.vocabulary_shards import Shard


def sharded_topk_divergence(
    hidden: DTensor,
    unembedding: DTensor,
    ids: Tensor,
    logprobs: Tensor,
    *,
    bias: DTensor | None = None,
    valid_vocab: int | None = None,
    **options: Any,
) -> Tensor:
    """`topk_divergence` with a head sharded over words: three all-reduces, no rank holds it whole.

    Args:
        hidden: [N, D] replicated over a mesh of one dimension.
        unembedding: [V, D] sharded over its rows on the same mesh; uneven shards are fine.
        ids, logprobs: plain tensors, the same on every rank.
        bias: [V] sharded as unembedding is.
        valid_vocab, options: see `topk_divergence`.

    Returns:
        Per-row loss [N], plain and the same on every rank.

    Raises:
        ValueError: placements that mean something else.
    """
    _require_placement("hidden", hidden, Replicate())
    _require_placement("unembedding", unembedding, ShardedOver(0))
    if bias is not None:
        _require_placement("bias", bias, ShardedOver(0))
    shard = shard_of(unembedding, valid_vocab)
    return topk_divergence(
        hidden.to_local(grad_placements=[Replicate()]),
        unembedding.to_local(),
        ids,
        logprobs,
        bias=None if bias is None else bias.to_local(),
        shard=shard,
        **options,
    )


def shard_of(unembedding: DTensor, valid_vocab: int | None = None) -> Shard:
    """The words of this rank's rows of a head sharded over its rows."""
    mesh = unembedding.device_mesh
    rows, ranks = unembedding.shape[0], mesh.size()
    words = rows if valid_vocab is None else valid_vocab
    largest = -(-rows // ranks)  # DTensor's own way to shard: the last ranks hold fewer
    start = min(mesh.get_local_rank() * largest, rows)
    width = max(0, min(unembedding.to_local().shape[0], words - start))
    return Shard(start, width, words, largest, mesh.get_group())


def _require_placement(name: str, tensor: Tensor, placement: Replicate | ShardedOver) -> None:
    found = tensor.placements if isinstance(tensor, DTensor) else "a plain tensor"
    if found != (placement,):
        raise ValueError(f"{name}: found {found}; expected a DTensor placed ({placement},)")


class DivergenceHead(nn.Module):
    """A linear head whose forward is the divergence, for FSDP2 to wrap.

    `fully_shard(DivergenceHead(model.lm_head))` gathers the head for the forward pass, frees it,
    and reduces its gradient as it does those of all other parameters. The weight may be tied: it
    is the same parameter that the linear layer had.
    """

    def __init__(self, head: nn.Linear):
        super().__init__()
        self.weight, self.bias = head.weight, head.bias

    def forward(self, hidden: Tensor, ids: Tensor, logprobs: Tensor, **options: Any) -> Tensor:
        """Per-row loss [N]; see `topk_divergence`."""
        bias = self.bias if isinstance(self.bias, torch.Tensor) else None
        return topk_divergence(hidden, self.weight, ids, logprobs, bias=bias, **options)
