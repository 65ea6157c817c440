"""Students cut out of a bigger model.

One idea: drop whole blocks, or whole inner units and head groups, so that what is left is an
ordinary model of the same architecture with a smaller config. Nothing is trained here.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from stillroom.cache_schemas.errors import StudentError


def prune_layers(model: Any, blocks: nn.ModuleList, keep: Sequence[int]) -> Any:
    """Keep the blocks `keep` (0-based, in that order) of a model, in place.

    Raises:
        StudentError: a block is named that the model does not have.
    """
    depth = len(blocks)
    bad = [number for number in keep if not 0 <= number < depth]
    if bad or not keep:
        raise StudentError(
            f"block {bad[0] if bad else '(none)'} cannot be kept",
            expected=f"blocks 0 to {depth - 1}",
            where="[student] keep_layers",
        )
    kept = [blocks[number] for number in keep]
    del blocks[:]
    blocks.extend(kept)
    for number, block in enumerate(blocks):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                # Attention finds its part of the key-value cache by this number.
                setattr(module, "layer_idx", number)  # noqa: B010
    text = model.config.get_text_config()
    text.num_hidden_layers = len(kept)
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[number] for number in keep]
    return model


def prune_width(
    model: Any, blocks: nn.ModuleList, keep_intermediate: float, keep_heads: float
) -> Any:
    """Keep the inner MLP units and key/value head groups of largest weight norm, in place.

    The importance of a unit is the product of the norms of what feeds it and of what it feeds
    (magnitude pruning; no data is needed). The residual width stays, so that embeddings, head and
    cached hidden states still fit.

    Raises:
        StudentError: the architecture is not a gated MLP with q/k/v/o projections.
    """
    text = model.config.get_text_config()
    inner = max(1, round(text.intermediate_size * keep_intermediate))
    groups = max(1, round(text.num_key_value_heads * keep_heads))
    per_group = text.num_attention_heads // text.num_key_value_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    for block in blocks:
        try:
            _prune_mlp(block.mlp, inner)
            _prune_attention(block.self_attn, groups, per_group, head_dim)
        except AttributeError as error:
            raise StudentError(
                f"{type(block).__name__} cannot be pruned in width ({error})",
                expected="mlp.{gate,up,down}_proj and self_attn.{q,k,v,o}_proj",
                remedy="Use init = 'prune_layers'.",
            ) from None
    text.intermediate_size = inner
    text.num_key_value_heads, text.num_attention_heads = groups, groups * per_group
    text.head_dim = head_dim
    return model


def _prune_mlp(mlp: Any, inner: int) -> None:
    feeds = mlp.gate_proj.weight.norm(dim=1) * mlp.up_proj.weight.norm(dim=1)  # [inner]
    units = _largest(feeds * mlp.down_proj.weight.norm(dim=0), inner)
    for linear in (mlp.gate_proj, mlp.up_proj):
        _keep_outputs(linear, units)
    _keep_inputs(mlp.down_proj, units)


def _prune_attention(attention: Any, groups: int, per_group: int, head_dim: int) -> None:
    values = attention.v_proj.weight.unflatten(0, (-1, head_dim)).norm(dim=(1, 2))  # [groups]
    outputs = attention.o_proj.weight.unflatten(1, (-1, per_group * head_dim)).norm(dim=(0, 2))
    kept = _largest(values * outputs, groups)
    units = _expand(kept, head_dim)  # channels of the kept groups
    for linear in (attention.k_proj, attention.v_proj):
        _keep_outputs(linear, units)
    _keep_outputs(attention.q_proj, _expand(kept, per_group * head_dim))
    _keep_inputs(attention.o_proj, _expand(kept, per_group * head_dim))


def _largest(importance: torch.Tensor, count: int) -> torch.Tensor:
    return importance.topk(count).indices.sort().values


def _expand(groups: torch.Tensor, size: int) -> torch.Tensor:
    return (groups[:, None] * size + torch.arange(size)).flatten()


def _keep_outputs(linear: nn.Linear, units: torch.Tensor) -> None:
    linear.weight = nn.Parameter(linear.weight.detach()[units].clone())
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[units].clone())
    linear.out_features = len(units)


def _keep_inputs(linear: nn.Linear, units: torch.Tensor) -> None:
    linear.weight = nn.Parameter(linear.weight.detach()[:, units].clone())
    linear.in_features = len(units)
