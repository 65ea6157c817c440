"""States after the blocks of models that vLLM itself does not ask for them, by hooks on the blocks.

One idea: a block of vLLM returns its state, or two tensors whose sum is its state, or its state and
a tensor that the next block does not read; which of these is measured: the model's last norm,
given the right one, makes what it made in the forward pass. Compiled graphs do not run hooks, so
the model must run eagerly. Models that give their states themselves are asked in `scoring`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed.parallel_state import get_pp_group

AGREEMENT = {torch.float32: 1e-4}
HALF_AGREEMENT = 3e-2


class BlockStates:
    """Collects states while a model runs.

    Args:
        model: vLLM's.
        layers: blocks (1-based), rising.
        vllm_config: of its engine.

    Raises:
        RuntimeError: this model's blocks cannot be hooked.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int], vllm_config: Any):
        self._name, self._layers = type(model).__name__, layers
        text = vllm_config.model_config.hf_text_config
        self._width = text.hidden_size
        blocks = _blocks_of(model, text.num_hidden_layers)
        self._check(blocks, vllm_config)
        self._last = len(blocks)
        self._seen: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._norm: tuple[nn.Module, Tensor] | None = None
        self._sums: bool | None = None
        for layer in sorted({*layers, self._last}):
            blocks[layer - 1].register_forward_hook(self._keep(layer))
        inside = {part for block in blocks for part in block.modules()}
        outside = [part for part in model.modules() if part not in inside]
        leaves = [part for part in outside if not any(part.children())]
        self._scouts = [leaf.register_forward_hook(self._scout) for leaf in leaves]

    def states(self) -> list[Tensor]:
        """[n, H] of each layer, of the forward pass before."""
        if self._sums is None:
            self._sums = self._adds_up()
            for scout in self._scouts:
                scout.remove()
        return [self._state(*self._seen[layer], self._sums) for layer in self._layers]

    def _check(self, blocks: Sequence[nn.Module], vllm_config: Any) -> None:
        wanted = ""
        if not blocks:
            wanted = "they have no list of blocks: leave hidden_layers out, but for 'final'"
        elif not vllm_config.model_config.enforce_eager:
            wanted = "compiled graphs hide them: set enforce_eager = true in [teacher.engine_args]"
        elif get_pp_group().world_size > 1:
            wanted = "they do not come through pipeline stages: use tensor_parallel_size"
        if wanted:
            raise RuntimeError(f"no hidden layers of {self._name} in vLLM: {wanted}")

    def _keep(self, layer: int):
        def hook(_module, _args, output) -> None:
            first, *more = _tensors(output)
            second = next((other for other in more if other.shape == first.shape), None)
            # The next block adds in place.
            self._seen[layer] = (first.clone(), None if second is None else second.clone())

        return hook

    def _scout(self, module, _args, output) -> None:
        """Remember the last module outside the blocks that made states."""
        found = _tensors(output)
        if found and found[0].shape[-1] == self._width and self._last in self._seen:
            self._norm = (module, found[0].clone())

    def _adds_up(self) -> bool:
        """Whether a block's state is the sum of what it returns.

        Raises:
            RuntimeError: neither the sum nor the first alone leads to the final state.
        """
        first, second = self._seen[self._last]
        if second is None or self._norm is None:
            return False
        norm, made = self._norm
        for adds_up, state in ((True, first + second), (False, first)):
            (found, *_) = _tensors(norm(state.clone()))
            gap = (found.float() - made.float()).abs().max()
            if gap <= AGREEMENT.get(made.dtype, HALF_AGREEMENT) * made.float().abs().max():
                return adds_up
        raise RuntimeError(f"cannot tell what the blocks of {self._name} hand on in vLLM")

    def _state(self, first: Tensor, second: Tensor | None, adds_up: bool) -> Tensor:
        state = first + second if adds_up and second is not None else first
        if state.shape[-1] != self._width:
            raise RuntimeError(f"{self._name} hands on {tuple(state.shape)} between its blocks")
        return state.reshape(-1, self._width)


def _blocks_of(model: nn.Module, depth: int) -> Sequence[nn.Module]:
    parts = (part for part in model.modules() if isinstance(part, nn.ModuleList))
    return next((part for part in parts if len(part) == depth), ())  # type: ignore[return-value]


def _tensors(output: Any) -> list[Tensor]:
    values = output if isinstance(output, tuple | list) else [output]
    return [value for value in values if isinstance(value, Tensor)]
