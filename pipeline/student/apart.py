"""Whether a student says of a packed text what it says of the text alone, measured.

One idea: a text that is moved, or that gets another neighbour, must change by no more than
rounding. Nothing here knows an architecture's name; only where there is no room to measure is the
config asked. Weights are the same afterwards.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch

from stillroom.pipeline.student.states import forward_states

ROUNDINGS = 64
"""Of the largest state: how far apart two computations of one thing may be."""
MOVED = 1e-2
"""Of a token's state: what a long text that was moved may differ by."""
TEXTS = 3
"""Texts that are moved before a place is blamed."""
LENGTH = 4
"""Tokens of a short text."""

ACROSS = "attends across packed documents"
PLACE = "says something else of a text that stands elsewhere in a row of {row} tokens"
LONGEST = "says something else of a text beside one of {longest} tokens"
BEYOND = (
    "{name} turns all positions of a microbatch by the farthest, and the longest text has "
    "{longest} tokens: shorter ones are trained as they are beside it, not as they are alone. With "
    "[prepare] window at the positions that its RoPE was first made for, all are as they are alone"
)
"""A note for texts whose rows are padded to the longest, which packing has no part in."""


def keeps_documents_apart(model: Any, vocab_size: int, row: int = 0, longest: int = 0) -> bool:
    """Whether a packed document sees nothing of those beside it, measured.

    Two rows that differ only in their first document must give states in the second that differ by
    no more than rounding, and so must a document that is moved or gets a long neighbour. First
    weights may be too small to let much through, or zero where it would pass, so it is measured
    with weights shaken as well, in fp32 at least; the weights are the same afterwards. A model that
    takes no positions cannot be told where a document begins.

    Args:
        model: a causal LM.
        vocab_size: ids that it knows.
        row: tokens of a row. In one so long, a document must not depend on its place either: some
            models cut their attention by places in the row. 0 leaves it out.
        longest: tokens of the longest document. Beside one so long, a short one must be what it is
            alone: some models turn all positions by the farthest. 0 leaves it out.
    """
    return not joined_by(model, vocab_size, row, longest)


def joined_by(model: Any, vocab_size: int, row: int = 0, longest: int = 0) -> str:
    """What a model does that keeps documents from sharing a row; empty where nothing does.

    Args: as of `keeps_documents_apart`.
    """
    with _as_in_use(model):
        try:
            return _joined_by(model, vocab_size, row, longest).format(row=row, longest=longest)
        except torch.OutOfMemoryError:  # a RuntimeError of the machine's, which says nothing
            raise
        except (TypeError, ValueError, RuntimeError):
            return ACROSS


def heeds_the_longest(model: Any, vocab_size: int, longest: int) -> bool:
    """Whether a short text is something else beside one of `longest` tokens, in a row of its own
    too: what is computed from the farthest position of a microbatch (RoPE of the types `longrope`
    and `dynamic`) is so for all of its rows."""
    with _as_in_use(model):
        try:
            with _shaken(model) as shaken:
                if shaken:
                    return not _is_one_beside(model, vocab_size, longest)
        except torch.OutOfMemoryError:
            pass
        except (TypeError, ValueError, RuntimeError):  # it takes no positions
            return False
    return _as_configured(model, 0, longest) == LONGEST


def _joined_by(model: Any, vocab_size: int, row: int, longest: int) -> str:
    if not _is_apart(model, vocab_size):
        return ACROSS
    try:
        with _shaken(model) as shaken:
            if not shaken:
                return _as_configured(model, row, longest)
            if not _is_apart(model, vocab_size, overflowing=True):
                return ACROSS
            if not _is_one_beside(model, vocab_size, longest):
                return LONGEST
            return "" if _is_one_anywhere(model, vocab_size, row, longest or row) else PLACE
    except torch.OutOfMemoryError:
        return _as_configured(model, row, longest)


def _as_configured(model: Any, row: int, longest: int) -> str:
    """The same where there is no room to measure: what transformers is known to read."""
    config = model.config.get_text_config()
    if row > (getattr(config, "attention_chunk_size", None) or row):
        return PLACE
    rope = getattr(config, "rope_parameters", None) or {}
    for one in [rope, *(part for part in rope.values() if isinstance(part, dict))]:
        if one.get("rope_type") in ("longrope", "dynamic"):
            limit = one.get("original_max_position_embeddings") or config.max_position_embeddings
            return LONGEST if longest > limit else ""
    return ""


@contextmanager
def _as_in_use(model: Any) -> Iterator[None]:
    """Without dropout, for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _shaken(model: Any) -> Iterator[bool]:
    """For a while, weights that are moved by about what trained ones are large, in fp32 at least.

    Quantised weights cannot be shaken: False. Neither can what there is no room to copy.
    """
    kept = [(one, one.data) for one in chain(model.parameters(), model.buffers())]
    parameters = list(model.parameters())
    if not all(one.is_floating_point() for one in parameters):
        yield False
        return
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
        yield True
    finally:
        for one, data in kept:
            one.data = data


def _is_apart(model: Any, vocab_size: int, overflowing: bool = False) -> bool:
    """What it says if its numbers overflow is `overflowing`."""
    ids = torch.arange(4 * LENGTH).remainder(vocab_size).view(2, 2 * LENGTH)  # [2, 2 * LENGTH]
    ids[1, LENGTH:] = ids[0, LENGTH:]
    places = torch.arange(LENGTH).repeat(2)  # restart at the second document
    first, second = (_states(model, row, places)[LENGTH:] for row in ids)
    if not (first.isfinite().all() and second.isfinite().all()):
        return overflowing
    return _is_rounding(model, first, second)


def _is_one_beside(model: Any, vocab_size: int, longest: int) -> bool:
    """Whether a short text is the same beside a token as far along as the longest text goes.

    That one token stands for the text: its position alone is what reaches the others.
    """
    if longest <= LENGTH + 1:
        return True
    ids = torch.arange(LENGTH + 1).remainder(vocab_size)
    # The near one comes last, and what `dynamic` keeps of the farthest position is gone again.
    ends = (longest - 1, 0)
    first, second = (
        _states(model, ids, torch.tensor([*range(LENGTH), end]))[:LENGTH] for end in ends
    )
    return _is_rounding(model, first, second)


def _is_one_anywhere(model: Any, vocab_size: int, row: int, longest: int) -> bool:
    """Whether a row's documents are the same one place further along.

    By one place, whatever is cut every so many places is cut elsewhere. A token that goes to
    another expert by a rounding does so in one text, and not at the same place of the next.
    """
    moved = torch.ones(max(row - 1, 0), dtype=torch.bool)
    for seed in range(TEXTS):
        if not moved.any():
            break
        moved &= _moved(model, vocab_size, row, longest, seed)
    return not moved.any()


def _moved(model: Any, vocab_size: int, row: int, longest: int, seed: int) -> torch.Tensor:
    """bool [row - 1]: the token is something else with one document of one token before it."""
    random = torch.Generator().manual_seed(seed)
    # Few ids: higher ones may stand for images.
    ids = torch.randint(min(vocab_size, 4 * LENGTH), (row - 1,), generator=random)
    places, one = torch.arange(row - 1).remainder(longest), torch.zeros(1, dtype=torch.int64)
    here = _states(model, torch.cat([ids, one]), torch.cat([places, one]))[:-1]
    there = _states(model, torch.cat([one, ids]), torch.cat([one, places]))[1:]
    allowed = max(MOVED, ROUNDINGS * _epsilon(model, here))
    return ((here - there).norm(dim=-1) > allowed * here.norm(dim=-1)).cpu()


def _is_rounding(model: Any, first: torch.Tensor, second: torch.Tensor) -> bool:
    # Where a mask keeps documents apart, they differ by nothing; where experts are sent all tokens
    # of a row at once, by the order of their sums. What overflows says nothing.
    allowed = ROUNDINGS * _epsilon(model, first) * first.abs().max()
    return not bool((first - second).abs().max() > allowed)


@torch.no_grad()
def _states(model: Any, ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """[S, D] of one row."""
    device = next(model.parameters()).device
    # Flash attention knows no fp32: as in training.
    with torch.autocast(device.type, torch.bfloat16, enabled=_is_flash(model)):
        return forward_states(model, ids[None].to(device), places[None].to(device)).final


def _epsilon(model: Any, states: torch.Tensor) -> float:
    return torch.finfo(torch.bfloat16 if _is_flash(model) else states.dtype).eps


def _is_flash(model: Any) -> bool:
    return str(getattr(model.config, "_attn_implementation", "")).startswith("flash")
