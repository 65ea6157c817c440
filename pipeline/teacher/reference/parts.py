"""The parts of a decoder of transformers, found by what they are and not by their names.

One idea: a decoder is a list of as many blocks as its config counts, and what a block has made is
what the next one reads. It runs no model.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from stillroom.cache_schemas.errors import TeacherError


def decoder_of(model: Any) -> Any:
    """The part that turns tokens into final hidden states; it does not hold the head."""
    found = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    if found is not model or not _is_of_transformers(model):
        return found
    blocks = _list_in(model)  # Llama 4 does not know its decoder's name
    owners = (part for part in model.modules() if any(own is blocks for own in part.children()))
    return next(owners, found)


def _is_of_transformers(model: Any) -> bool:
    """Whether it is a PreTrainedModel; asked without the import, for students of plain torch."""
    kinds = ((kind.__module__.split(".")[0], kind.__name__) for kind in type(model).__mro__)
    return ("transformers", "PreTrainedModel") in kinds


def find_blocks(model: Any) -> nn.ModuleList | None:
    """The decoder's blocks, found by their number; None where there is no such list."""
    return _list_in(decoder_of(model), model.config)


def _list_in(model: Any, config: Any = None) -> nn.ModuleList | None:
    depth = (config or model.config).get_text_config().num_hidden_layers
    lists = (part for part in model.modules() if isinstance(part, nn.ModuleList))
    return next((part for part in lists if len(part) == depth), None)


class BlockOutputs:
    """While open, collects the states after chosen decoder blocks (1-based) as layer -> [L, H].

    The state after a block is what the next one reads: Qwen3-VL adds features of the picture
    between its first blocks.

    Raises:
        TeacherError: the model has no such blocks, or they hand on more than one state a token.
    """

    def __init__(self, model: Any, layers: Sequence[int]):
        self._model, self._layers = model, layers
        self._width = model.config.get_text_config().hidden_size
        self._handles: list = []

    def __enter__(self) -> dict:
        states: dict = {}
        blocks = find_blocks(self._model) if self._layers else nn.ModuleList()
        if blocks is None:
            raise self._refusal("has no list of its blocks")
        for layer in self._layers:
            self._handles.append(self._hook(blocks, states, layer))
        return states

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, blocks: nn.ModuleList, states: dict, layer: int) -> Any:
        def before_next(_module, args, kwargs):
            states[layer] = self._state([*args, *kwargs.values()], layer)

        def after_last(_module, _args, output):
            states[layer] = self._state(output if isinstance(output, tuple) else [output], layer)

        if layer == len(blocks):
            return blocks[-1].register_forward_hook(after_last)
        return blocks[layer].register_forward_pre_hook(before_next, with_kwargs=True)

    def _state(self, values: Sequence[Any], layer: int) -> torch.Tensor:
        """The first float tensor, which must be one state per token."""
        floats = (v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point())
        state = next(floats, torch.empty(0))
        if state.dim() != 3 or len(state) != 1 or state.shape[-1] != self._width:
            raise self._refusal(f"hands on {tuple(state.shape)} after block {layer}")
        return state[0]

    def _refusal(self, found: str) -> TeacherError:
        return TeacherError(
            f"{type(self._model).__name__} {found}",
            expected=f"a list of blocks with one state of width {self._width} per token between",
            where="[capture] hidden_layers",
            remedy="Leave its hidden layers out; 'final' can be had.",
        )
