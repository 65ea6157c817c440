"""What a forward pass of a student gives the objectives: hidden states and the head, no logits.

One idea: any decoder of transformers is a list of blocks, a final norm and a linear head; this
module runs all but the head, whose formula was measured on the model (`teacher.reference.head`).
It neither makes nor saves students.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from stillroom.cache_schemas.errors import StudentError
from stillroom.pipeline.data.images import ImageBatch
from stillroom.pipeline.student.llava import WideStates, embed, insert_behind_images, with_tokens
from stillroom.pipeline.teacher.reference.head import Head, form_of, head_of
from stillroom.pipeline.teacher.reference.parts import decoder_of, find_blocks


@dataclass(frozen=True, slots=True)
class Routing:
    """What the routers of a student's experts said.

    Attributes:
        logits: [B * S, experts] of each block that has experts.
        experts: number of them.
        per_token: how many of them a token is sent to.
    """

    logits: tuple[torch.Tensor, ...]
    experts: int
    per_token: int


@dataclass(frozen=True, slots=True)
class StudentStates:
    """What one forward pass of a student gives the objectives.

    Attributes:
        final: [B * S, D], what the head's matrix is multiplied with.
        head: the LM head.
        blocks: block number (1-based) -> [B * S, D], the block's output.
        wide: the same with task tokens in the sequence; None where there are none.
        routing: what the routers of experts said; None unless it was asked for.
    """

    final: torch.Tensor
    head: Head
    blocks: dict[int, torch.Tensor] = field(default_factory=dict)
    wide: WideStates | None = None
    routing: Routing | None = None

    def at(self, rows: torch.Tensor) -> torch.Tensor:
        """[N, D]: what the head multiplies at chosen flat positions."""
        chosen = self.final[rows]
        return chosen if self.head.scale == 1.0 else chosen * self.head.scale


def blocks_of(model: Any) -> nn.ModuleList:
    """The decoder's blocks, found by their number, so that any architecture will do."""
    found = find_blocks(model)
    if found is None:
        depth = model.config.get_text_config().num_hidden_layers
        raise StudentError(
            f"no list of {depth} blocks in {type(model).__name__}",
            remedy="Use a decoder-only architecture.",
        )
    return found


def forward_states(
    model: Any,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    blocks: Sequence[int] = (),
    images: ImageBatch | None = None,
    task_tokens: torch.Tensor | None = None,
    packed: bool = True,
    routed: bool = False,
    reaching: bool = False,
) -> StudentStates:
    """Run the decoder without its head.

    Args:
        model: a causal LM, or a LLaVA-type model where there are pixels.
        input_ids: [B, S].
        position_ids: [B, S], restarting at every packed document.
        blocks: numbers (1-based) of blocks whose outputs are wanted too.
        images: of the batch.
        task_tokens: [count, D], stand behind every image; they are in `wide` only.
        packed: rows hold several documents. Otherwise positions are the model's own business: many
            architectures take none.
        routed: the routers' logits are wanted too.
        reaching: without pixels, what sees has a gradient of zeros.
    """
    given, layout = {"input_ids": input_ids}, None
    changed = images is not None and (images.pixels is not None or task_tokens is not None)
    if changed or reaching:
        embeddings = embed(model, input_ids, images, reaching)
        if images is not None and task_tokens is not None:
            layout = insert_behind_images(position_ids, images, len(task_tokens))
            embeddings = with_tokens(embeddings, layout, task_tokens)
            position_ids = layout.position_ids
        given = {"inputs_embeds": embeddings}
    more: dict[str, Any] = {"position_ids": position_ids} if packed else {}
    if routed:
        more["output_router_logits"] = True
    outputs: dict[int, torch.Tensor] = {}
    layers = blocks_of(model) if blocks else ()
    hooks = [layers[n - 1].register_forward_hook(_keep(outputs, n)) for n in blocks]
    try:
        found = decoder_of(model)(**given, **more, attention_mask=None, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    final, head = read_by_head(model, found.last_hidden_state).flatten(0, 1), head_of(model)
    routing = _routing(model, found) if routed else None
    if layout is None:
        return StudentStates(final, head, outputs, routing=routing)
    kept = {number: states[layout.kept] for number, states in outputs.items()}
    return StudentStates(final[layout.kept], head, kept, WideStates(layout, outputs), routing)


def read_by_head(model: Any, state: torch.Tensor) -> torch.Tensor:
    """What the LM head's matrix is multiplied with: the last state, or a factor times that.

    Raises:
        StudentError: the model does something else to it first.
    """
    factor = form_of(model).state
    if factor is None:
        raise StudentError(
            f"{type(model).__name__} changes its last state before its head reads it",
            expected="a head that reads the decoder's last state, or a factor times that",
            remedy="Use another architecture.",
        )
    return state if factor == 1.0 else state * factor


def check_head_rows(found: int, words: int, where: str) -> None:
    """Refuse a head without rows for every word.

    Args:
        found: its rows.
        words: ids of the tokenizer; what a teacher has beyond them is padding.
        where: the student, for messages.

    Raises:
        StudentError: it has fewer.
    """
    if found < words:
        raise StudentError(
            f"the head has {found} rows",
            expected=f"at least the tokenizer's {words} ids",
            where=where,
            remedy="Take a student whose embeddings and head are of the teacher's tokenizer.",
        )


def balancing_weight(model: Any) -> float:
    """The coefficient of the load-balancing loss in a model's config; 0 where there is none."""
    return float(getattr(model.config.get_text_config(), "router_aux_loss_coef", None) or 0.0)


def tells_its_routing(model: Any) -> bool:
    """Whether a model with experts hands out its routers' logits, tried."""
    device = next(model.parameters()).device
    ids = torch.arange(2, device=device)[None]
    with torch.no_grad():
        try:
            routing = forward_states(model, ids, ids, routed=True).routing
        except (TypeError, AttributeError, ValueError):
            return False
    return routing is not None


def _routing(model: Any, found: Any) -> Routing | None:
    text = model.config.get_text_config()
    names = ("num_experts_per_tok", "experts_per_token", "moe_k")
    per_token = next((v for v in (getattr(text, name, None) for name in names) if v), None)
    logits = tuple(one.flatten(0, -2) for one in getattr(found, "router_logits", None) or ())
    if not logits or not per_token:
        return None
    return Routing(logits, logits[0].shape[-1], per_token)


def _keep(outputs: dict[int, torch.Tensor], number: int) -> Callable:
    def hook(_module, _inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        outputs[number] = hidden.flatten(0, 1)

    return hook
