"""Students cut out of a bigger model.

One idea: drop whole blocks, or whole inner units and head groups, so that what is left is an
ordinary model of the same architecture with a smaller config; beside it goes what the source says
with those parts switched off, which the saved student must say too. Nothing is trained here.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from stillroom.cache_schemas.errors import StudentError
from stillroom.pipeline.student.layer_lists import keep_layers
from stillroom.pipeline.student.sameness import Expected, expected_of


def prune_layers(model: Any, blocks: nn.ModuleList, keep: Sequence[int]) -> Expected:
    """Keep the blocks `keep` (0-based, rising) of a model, in place.

    Returns:
        What the model says when the other blocks hand on what they are given.

    Raises:
        StudentError: a block is named that the model does not have, or not in order.
    """
    _check_keep(keep, len(blocks))
    expected = expected_of(model, keep)
    kept = [blocks[number] for number in keep]
    del blocks[:]
    blocks.extend(kept)
    for number, block in enumerate(blocks):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                # Attention finds its part of the key-value cache by this number.
                setattr(module, "layer_idx", number)  # noqa: B010
    keep_layers(model.config.get_text_config(), keep)
    return expected


def _check_keep(keep: Sequence[int], depth: int) -> None:
    bad = [number for number in keep if not 0 <= number < depth]
    if bad or not keep:
        raise StudentError(
            f"block {bad[0] if bad else '(none)'} cannot be kept",
            expected=f"blocks 0 to {depth - 1}",
            where="[student] keep_layers",
        )
    if list(keep) != sorted(set(keep)):
        raise StudentError(
            f"blocks {', '.join(map(str, keep))} are out of order",
            expected="each block once, in the teacher's order",
            where="[student] keep_layers",
            remedy=f"Write keep_layers = {sorted(set(keep))}.",
        )


def prune_width(
    model: Any, blocks: nn.ModuleList, keep_intermediate: float, keep_heads: float
) -> Expected:
    """Keep the inner MLP units and key/value head groups of largest weight norm, in place.

    The importance of a unit is the product of the norms of what feeds it and of what it feeds
    (magnitude pruning; no data is needed). The residual width stays, so that embeddings, head and
    cached hidden states still fit.

    Returns:
        What the model says when nothing reads the other units.

    Raises:
        StudentError: the architecture is not an MLP of `up_proj` and `down_proj`, with or without
            a gate, beside q/k/v/o projections; a share below 1 that leaves nothing out.
    """
    text, layers = model.config.get_text_config(), cast("list[Any]", list(blocks))
    heads = text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    kept_groups = _kept("keep_heads", keep_heads, groups, "groups of heads")
    try:
        width = text.intermediate_size
        inner = _kept("keep_intermediate", keep_intermediate, width, "units of an MLP")
        units = [_best_units(block.mlp, inner) for block in layers]
        sets = [_best_groups(block.self_attn, groups, kept_groups) for block in layers]
    except (AttributeError, TypeError, RuntimeError) as error:
        raise StudentError(
            f"{type(blocks[0]).__name__} cannot be pruned in width ({error})",
            expected="mlp.{up,down}_proj and self_attn.{q,k,v,o}_proj",
            remedy="Use init = 'prune_layers'.",
        ) from None
    for block, own_units, own_groups in zip(layers, units, sets):
        _silence(block.mlp.down_proj, own_units)
        output = block.self_attn.o_proj
        _silence(output, _expand(own_groups, output.in_features, groups))
    expected = expected_of(model)
    for block, own_units, own_groups in zip(layers, units, sets):
        _cut_mlp(block.mlp, own_units)
        _cut_attention(block.self_attn, own_groups, groups)
    text.intermediate_size = inner
    if kept_groups != groups:
        text.head_dim = layers[0].self_attn.k_proj.out_features // kept_groups
        text.num_key_value_heads = kept_groups
        text.num_attention_heads = heads // groups * kept_groups
    return expected


def _kept(key: str, share: float, count: int, what: str) -> int:
    """How many a share keeps; one that asks for fewer and rounds to all is refused."""
    kept = max(1, round(count * share))
    if kept == count and share < 1:
        less = math.floor((count - 1) / count * 10_000) / 10_000
        smaller = f"{key} = {less:g} for {round(count * less)}, or " if count > 1 else ""
        raise StudentError(
            f"{key} = {share:g} keeps all {count} {what}",
            expected="a share that leaves some out, or 1.0",
            where="[student]",
            remedy=f"Write {smaller}{key} = 1.0 for all of them.",
        )
    return kept


def _best_units(mlp: Any, count: int) -> torch.Tensor:
    feeds = mlp.up_proj.weight.norm(dim=1)
    if hasattr(mlp, "gate_proj"):
        feeds = feeds * mlp.gate_proj.weight.norm(dim=1)
    return _largest(feeds * mlp.down_proj.weight.norm(dim=0), count)


def _best_groups(attention: Any, groups: int, count: int) -> torch.Tensor:
    for name in ("q_proj", "k_proj"):
        getattr(attention, name)  # an AttributeError here is the refusal
    values = attention.v_proj.weight.unflatten(0, (groups, -1)).norm(dim=(1, 2))
    outputs = attention.o_proj.weight.unflatten(1, (groups, -1)).norm(dim=(0, 2))
    return _largest(values * outputs, count)


def _cut_mlp(mlp: Any, units: torch.Tensor) -> None:
    for linear in (getattr(mlp, "gate_proj", None), mlp.up_proj):
        if linear is not None:
            _keep_outputs(linear, units)
    _keep_inputs(mlp.down_proj, units)


def _cut_attention(attention: Any, kept: torch.Tensor, groups: int) -> None:
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        _keep_outputs(linear, _expand(kept, linear.out_features, groups))
    _keep_inputs(attention.o_proj, _expand(kept, attention.o_proj.in_features, groups))


def _largest(importance: torch.Tensor, count: int) -> torch.Tensor:
    return importance.topk(count).indices.sort().values


def _expand(kept: torch.Tensor, width: int, groups: int) -> torch.Tensor:
    """Units of the kept groups, of `width` units in `groups` equal groups."""
    size = width // groups
    return (kept[:, None] * size + torch.arange(size)).flatten()


@torch.no_grad()
def _silence(linear: nn.Linear, kept: torch.Tensor) -> None:
    """Inputs that are not kept count for nothing."""
    silent = torch.ones(linear.in_features, dtype=torch.bool)
    silent[kept] = False
    linear.weight[:, silent] = 0


def _keep_outputs(linear: nn.Linear, units: torch.Tensor) -> None:
    linear.weight = nn.Parameter(linear.weight.detach()[units].clone())
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[units].clone())
    linear.out_features = len(units)


def _keep_inputs(linear: nn.Linear, units: torch.Tensor) -> None:
    linear.weight = nn.Parameter(linear.weight.detach()[:, units].clone())
    linear.in_features = len(units)
