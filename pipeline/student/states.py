"""What a forward pass of a student gives the objectives: hidden states and the head, no logits.

One idea: any decoder of transformers is a list of blocks, a final norm and a linear head; this
module runs all but the head, whose formula was measured on the model (`teacher.reference.head`).
It neither makes nor saves students.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import nn

from stillroom.cache_schemas.errors import StudentError
from stillroom.pipeline.data.images import ImageBatch
from stillroom.pipeline.student.llava import WideStates, embed, insert_behind_images, with_tokens
from stillroom.pipeline.teacher.reference.head import Head, form_of, head_of
from stillroom.pipeline.teacher.reference.parts import decoder_of, find_blocks

ROUNDINGS = 64
"""Of the largest state: how far apart two computations of one thing may be."""


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


def keeps_documents_apart(model: Any, vocab_size: int) -> bool:
    """Whether a packed document sees nothing of the one before it, measured.

    Two rows that differ only in their first document must give states in the second that differ by
    no more than rounding. First weights may be too small to let much through, or zero where it
    would pass, so it is measured with weights shaken as well, in fp32 at least; the weights are the
    same afterwards. A model that takes no positions cannot be told where a document begins.
    """
    was_training = model.training
    model.eval()
    try:
        return _is_apart(model, vocab_size) and _is_apart_shaken(model, vocab_size)
    except torch.OutOfMemoryError:  # a RuntimeError of the machine's, which says nothing
        raise
    except (TypeError, ValueError, RuntimeError):
        return False
    finally:
        model.train(was_training)


def _is_apart_shaken(model: Any, vocab_size: int) -> bool:
    """The same of a model whose weights are moved by about what trained ones are large.

    Quantised weights cannot be shaken, and neither can what there is no room to copy: nothing more
    is found of them, and True.
    """
    kept = [(one, one.data) for one in chain(model.parameters(), model.buffers())]
    parameters = list(model.parameters())
    if not all(one.is_floating_point() for one in parameters):
        return True
    random = {one.device: torch.Generator(one.device).manual_seed(0) for one in parameters}
    try:
        for one, data in kept:
            if data.is_floating_point():
                one.data = data.to(torch.promote_types(data.dtype, torch.float32))
        for one in parameters:
            noise = torch.empty_like(one.data).normal_(generator=random[one.device])
            # A row of 1 / sqrt(n) neither grows nor shrinks what it is multiplied with.
            one.data = noise.mul_(min(0.5, one.shape[-1] ** -0.5) if one.dim() > 1 else 0.05).add_(
                one.data
            )
        return _is_apart(model, vocab_size, overflowing=True)
    except torch.OutOfMemoryError:
        return True
    finally:
        for one, data in kept:
            one.data = data


def _is_apart(model: Any, vocab_size: int, overflowing: bool = False) -> bool:
    """What it says if its numbers overflow is `overflowing`."""
    length = 4
    ids = torch.arange(4 * length).remainder(vocab_size).view(2, 2 * length)  # [2, 2 * length]
    ids[1, length:] = ids[0, length:]
    device = next(model.parameters()).device
    position = torch.arange(length).repeat(2)[None].to(device)  # restarts at the second document
    flash = str(getattr(model.config, "_attn_implementation", "")).startswith("flash")
    # Flash attention knows no fp32: as in training.
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=flash):
        first, second = (
            forward_states(model, row[None].to(device), position).final[length:] for row in ids
        )
    if not (first.isfinite().all() and second.isfinite().all()):
        return overflowing
    epsilon = torch.finfo(torch.bfloat16 if flash else first.dtype).eps
    # Where a mask keeps documents apart, they differ by nothing; where experts are sent all tokens
    # of a row at once, by the order of their sums.
    return bool((first - second).abs().max() <= ROUNDINGS * epsilon * first.abs().max())


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
