"""What a forward pass of a student gives the objectives: hidden states and the head, no logits.

One idea: any decoder of transformers is a list of blocks, a final norm and a linear head; this
module finds them and runs all but the head. It neither makes nor saves students.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from stillroom.cache_schemas.errors import StudentError
from stillroom.pipeline.data.images import ImageBatch
from stillroom.pipeline.student.llava import WideStates, embed, insert_behind_images, with_tokens


@dataclass(frozen=True, slots=True)
class Head:
    """The LM head: logits = softcap(scale * hidden @ weight.T + bias).

    Attributes:
        weight: [V, D].
        bias: [V] or None.
        softcap: c of c * tanh(z / c), or None.
        scale: factor that some architectures put on the product.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    softcap: float | None
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class StudentStates:
    """What one forward pass of a student gives the objectives.

    Attributes:
        final: [B * S, D], after the final norm.
        head: the LM head.
        blocks: block number (1-based) -> [B * S, D], the block's output.
        wide: the same with task tokens in the sequence; None where there are none.
    """

    final: torch.Tensor
    head: Head
    blocks: dict[int, torch.Tensor] = field(default_factory=dict)
    wide: WideStates | None = None

    def at(self, rows: torch.Tensor) -> torch.Tensor:
        """[N, D]: what the head multiplies at chosen flat positions."""
        chosen = self.final[rows]
        return chosen if self.head.scale == 1.0 else chosen * self.head.scale


def blocks_of(model: Any) -> nn.ModuleList:
    """The decoder's blocks, found by their number, so that any architecture will do."""
    depth = model.config.get_text_config().num_hidden_layers
    found = [
        module
        for module in decoder_of(model).modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if not found:
        raise StudentError(
            f"no list of {depth} blocks in {type(model).__name__}",
            remedy="Use a decoder-only architecture.",
        )
    return found[0]


def decoder_of(model: Any) -> Any:
    """The part that turns tokens into final hidden states."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model.base_model


def head_of(model: Any) -> Head:
    """The LM head and what the architecture does to its logits."""
    head, text = model.get_output_embeddings(), model.config.get_text_config()
    scale = getattr(text, "logit_scale", None) or 1.0  # Cohere multiplies
    scale /= getattr(text, "logits_scaling", None) or 1.0  # Granite divides
    softcap = getattr(text, "final_logit_softcapping", None)
    return Head(head.weight, getattr(head, "bias", None), softcap, scale)


def forward_states(
    model: Any,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    blocks: Sequence[int] = (),
    images: ImageBatch | None = None,
    task_tokens: torch.Tensor | None = None,
) -> StudentStates:
    """Run the decoder without its head.

    Args:
        model: a causal LM, or a LLaVA-type model where there are pixels.
        input_ids: [B, S].
        position_ids: [B, S], restarting at every packed document.
        blocks: numbers (1-based) of blocks whose outputs are wanted too.
        images: of the batch.
        task_tokens: [count, D], stand behind every image; they are in `wide` only.
    """
    given, layout = {"input_ids": input_ids}, None
    if images is not None and (images.pixels is not None or task_tokens is not None):
        embeddings = embed(model, input_ids, images)
        if task_tokens is not None:
            layout = insert_behind_images(position_ids, images, len(task_tokens))
            embeddings = with_tokens(embeddings, layout, task_tokens)
            position_ids = layout.position_ids
        given = {"inputs_embeds": embeddings}
    outputs: dict[int, torch.Tensor] = {}
    layers = blocks_of(model) if blocks else ()
    hooks = [layers[n - 1].register_forward_hook(_keep(outputs, n)) for n in blocks]
    try:
        found = decoder_of(model)(
            **given, position_ids=position_ids, attention_mask=None, use_cache=False
        )
    finally:
        for hook in hooks:
            hook.remove()
    final, head = found.last_hidden_state.flatten(0, 1), head_of(model)  # [B * S', D]
    if layout is None:
        return StudentStates(final, head, outputs)
    kept = {number: states[layout.kept] for number, states in outputs.items()}
    return StudentStates(final[layout.kept], head, kept, WideStates(layout, outputs))


def check_documents_are_isolated(model: Any, vocab_size: int) -> None:
    """Refuse a model that lets a packed document see the one before it.

    Two rows that differ only in their first document must give equal states in the second.
    """
    length = 4
    ids = torch.arange(4 * length).remainder(vocab_size).view(2, 2 * length)  # [2, 2 * length]
    ids[1, length:] = ids[0, length:]
    positions = torch.arange(length).repeat(2, 2)  # they restart at the second document
    device = next(model.parameters()).device
    was_training = model.training
    with torch.no_grad():
        model.eval()
        final = [
            forward_states(model, row[None].to(device), place[None].to(device)).final[length:]
            for row, place in zip(ids, positions)
        ]
        model.train(was_training)
    if not torch.allclose(final[0], final[1], rtol=1e-2, atol=1e-3):
        raise StudentError(
            f"{type(model).__name__} attends across packed documents",
            expected="position_ids that restart to separate documents",
            remedy="Set sequence_length so that each row holds one example, or change attention.",
        )


def _keep(outputs: dict[int, torch.Tensor], number: int) -> Callable:
    def hook(_module, _inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        outputs[number] = hidden.flatten(0, 1)

    return hook
