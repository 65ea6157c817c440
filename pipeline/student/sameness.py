"""Whether a directory holds the model that was meant: it is loaded again and compared.

One idea: no list of architectures knows all the places where a config says what a block does, so a
student is what plain transformers makes of its directory. That is compared with a statement that
needs no second config: logits of the model it was cut from, with what is left out switched off. It
mends nothing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stillroom.cache_schemas.errors import StudentError, first_line
from stillroom.pipeline.student.loading import load
from stillroom.pipeline.student.states import blocks_of

TOLERANCE = 1e-4
"""Largest difference of logits, as a share of the largest logit: fp32 sums of a few thousand terms,
in another order where units were cut away, through some ten blocks."""
LENGTH, LONGEST = 24, 1024


@dataclass(frozen=True, slots=True)
class Expected:
    """What a saved student must be.

    Attributes:
        logits: float32 [2, L, V] for the ids of `probe`.
        ids: int64 [2, L].
        blocks: what its blocks say of themselves, in order; empty where nothing was cut.
        places: where the blocks were in the model that they are from.
    """

    logits: torch.Tensor
    ids: torch.Tensor
    blocks: tuple[dict[str, Any], ...] = ()
    places: tuple[int, ...] = ()


def expected_of(model: Any, keep: Sequence[int] = ()) -> Expected:
    """What a model says, in memory; with `keep`, what it says when only those blocks (0-based,
    rising) act and all others hand on what they are given."""
    ids = probe(model)
    if not keep:
        return Expected(logits_of(model, ids), ids)
    blocks = blocks_of(model)
    with skipped([block for n, block in enumerate(blocks) if n not in keep]):
        logits = logits_of(model, ids)
    said = tuple(_says_of_itself(blocks[n]) for n in keep)
    return Expected(logits, ids, said, tuple(keep))


def probe(model: Any) -> torch.Tensor:
    """int64 [2, L] of ids that the model has, longer than its attention window where that is not
    too long to try."""
    text = model.config.get_text_config()
    windows = [getattr(text, key, None) for key in ("sliding_window", "attention_chunk_size")]
    reach = max((w for w in windows if w and w <= LONGEST), default=0) + LENGTH
    length = min(reach, getattr(text, "max_position_embeddings", None) or reach)
    return torch.arange(2 * length).mul(7).add(4).remainder(text.vocab_size).view(2, length)


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """float32 logits [B, L, V] by the model's own forward pass, without dropout.

    Raises:
        StudentError: it has none, as a model may that was cut where it cannot be.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    try:
        logits = model(input_ids=ids.to(device), use_cache=False).logits.float().cpu()
    except Exception as error:  # whatever another library's forward pass raises
        raise StudentError(
            f"{type(model).__name__} cannot run here ({type(error).__name__}: {first_line(error)})",
            expected="a decoder that gives logits for ids alone",
            where="[student]",
        ) from None
    model.train(training)
    return logits


def check_saved(directory: Path, expected: Expected) -> None:
    """Load a directory with plain transformers and compare it.

    Raises:
        StudentError: it does not load, says something else, or has other blocks.
    """
    model = load(directory)
    found = logits_of(model, expected.ids)
    if found.shape != expected.logits.shape:
        raise _other(f"gives logits of shape {list(found.shape)}")
    gap = float((found - expected.logits).abs().max())
    if not gap <= TOLERANCE * max(1.0, float(expected.logits.abs().max())):
        raise _other(f"gives logits that differ by {gap:.2g}")
    if expected.blocks:
        _check_blocks(blocks_of(model), expected)


def _other(what: str) -> StudentError:
    return StudentError(f"the saved student, loaded again by transformers, {what}")


def _check_blocks(blocks: nn.ModuleList, expected: Expected) -> None:
    """What a short text does not show, such as a window: each block says what it said before."""
    for new, (block, said, old) in enumerate(zip(blocks, expected.blocks, expected.places)):
        own = _says_of_itself(block)
        for key in sorted(own.keys() & said.keys()):
            names_itself = (said[key], own[key]) in ((old, new), (old + 1, new + 1))
            if said[key] != own[key] and not names_itself:
                raise _other(f"has {key} = {own[key]!r} in block {new}, not {said[key]!r}")


def _says_of_itself(block: nn.Module) -> dict[str, Any]:
    """Plain values that a block's modules were made with, by name."""
    return {
        f"{name}.{key}".lstrip("."): value
        for name, module in block.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str | None) and not key.startswith("_")
        if key not in ("training", "gradient_checkpointing")
    }


@contextmanager
def skipped(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Within it these blocks hand on what they are given."""
    hooks = [b.register_forward_hook(_hand_on, with_kwargs=True) for b in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hand_on(_module, given, named, output):
    hidden = given[0] if given else next(iter(named.values()))
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
