"""DistillBatch: packed tokens and what the teachers said about them, as tensors.

One idea: documents share packed rows, but every scored row, hidden position and example keeps its
own index, so that a loss never has to know how it was packed. Attention across documents is
prevented by `position_ids`, which restart at 0 with every document (transformers builds the
block-diagonal mask, or the varlen lengths, from exactly that).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch

from stillroom.cache_schemas.errors import StudentError
from stillroom.cache_schemas.signals import is_hidden
from stillroom.pipeline.data.images import ImageBatch, images_of
from stillroom.pipeline.record import Example, TeacherRecord

NO_LABEL = -100


@dataclass(frozen=True, slots=True)
class Units:
    """What a per-row or per-position loss is about.

    Attributes:
        flat: int64 [N], index into the flattened [B * S] tokens.
        example: int64 [N], index into the batch's examples.
        answer: bool [N], the token that follows is under the loss mask: row t and the state at t
            predict the same one.
        image: bool [N], inside an image span.
    """

    flat: torch.Tensor
    example: torch.Tensor
    answer: torch.Tensor
    image: torch.Tensor


@dataclass(frozen=True, slots=True)
class Teacher:
    """One cache's answers about a batch.

    Attributes:
        signals: row signals [N, ...] in the order of `DistillBatch.rows`; hidden states
            [P, width] in the order of `positions`.
        positions: where the hidden states are.
    """

    signals: dict[str, torch.Tensor]
    positions: Units


_NOWHERE = torch.empty(0, dtype=torch.int64)
NO_TEACHER = Teacher({}, Units(_NOWHERE, _NOWHERE, _NOWHERE.bool(), _NOWHERE.bool()))
"""Stands for a cache that says nothing about tokens."""


@dataclass(frozen=True, slots=True)
class DistillBatch:
    """One microbatch.

    Attributes:
        input_ids: int64 [B, S]; padding holds token 0.
        position_ids: int64 [B, S]; restart at every document, 0 at every padding token.
        rows: the scored rows (row t predicts token t+1).
        own_answer: bool [N], row t's own token is under the loss mask (LLaVADI's unshifted rows).
        labels: int64 [N], the token that follows row t.
        teachers: cache name -> answers; "" is `train.cache`.
        example_ids: [E].
        sources: [E].
        sample_weight: float32 [E].
        num_tokens: tokens without padding.
        images: the examples' images; None where there are none.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    rows: Units
    own_answer: torch.Tensor
    labels: torch.Tensor
    teachers: dict[str, Teacher]
    example_ids: tuple[str, ...]
    sources: tuple[str, ...]
    sample_weight: torch.Tensor
    num_tokens: int
    images: ImageBatch | None = None

    def to(self, device: torch.device | str) -> "DistillBatch":
        """The same batch on another device."""
        return _map(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "DistillBatch":
        """The same batch in page-locked memory (called by DataLoader)."""
        return _map(self, torch.Tensor.pin_memory)


def _map(value: Any, change) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{f.name: _map(getattr(value, f.name), change) for f in fields(value)}
        )
    return value


def collate(
    rows: Sequence[Sequence[dict[str, TeacherRecord]]], capacity: int, padding_free: bool = False
) -> DistillBatch:
    """Lay records out as packed rows.

    An example that one of its caches rejected adds nothing: no rows, positions or images of any
    cache, as if all of them had rejected it.

    Args:
        rows: packed rows; each holds examples, each example is cache name -> record.
        capacity: S, tokens of a row.
        padding_free: lay all documents end to end in one row [1, tokens] instead of [B, S].

    Raises:
        StudentError: two caches scored different rows of the same example.
    """
    rows = [[_agreed(example) for example in row] for row in rows]
    starts, width = _starts(rows, capacity, padding_free)
    examples = [example for row in rows for example in row]
    mains = [example[""] for example in examples]
    tokens = np.zeros(width * (1 if padding_free else len(rows)), dtype=np.int64)  # [B * S]
    positions = np.zeros_like(tokens)  # padding keeps 0: each token a document
    for record, start in zip(mains, starts, strict=True):
        length = len(record.example.token_ids)
        tokens[start : start + length] = record.example.token_ids
        positions[start : start + length] = np.arange(length)
    units = [_row_units(record, start, e) for e, (record, start) in enumerate(zip(mains, starts))]
    return DistillBatch(
        input_ids=torch.from_numpy(tokens).view(-1, width),
        position_ids=torch.from_numpy(positions).view(-1, width),
        rows=_units([unit[:4] for unit in units]),
        own_answer=_join([unit[4] for unit in units]),
        labels=_join([unit[5] for unit in units]),
        teachers={name: _teacher(examples, starts, name) for name in examples[0]},
        example_ids=tuple(record.example.example_id for record in mains),
        sources=tuple(record.example.source for record in mains),
        sample_weight=torch.tensor([record.example.weight for record in mains]),
        num_tokens=sum(len(record.example.token_ids) for record in mains),
        images=images_of(mains, starts),
    )


def _agreed(example: dict[str, TeacherRecord]) -> dict[str, TeacherRecord]:
    """The example, or its first token alone where a cache that is read holds no more of it.

    A rejected example has lost its text (`teacher.protocol.empty_record`), and where another
    cache's rows and positions stand is told by the text.
    """
    read = [record for name, record in example.items() if not name or record.signals]
    if all(len(record.example.token_ids) > 1 for record in read):
        return example
    return {name: _without_answer(record) for name, record in example.items()}


def _without_answer(record: TeacherRecord) -> TeacherRecord:
    text, none = record.example, np.zeros(1, dtype=bool)
    cut = replace(text, token_ids=text.token_ids[:1], loss_mask=none, images=())
    signals = {name: array[:0] for name, array in record.signals.items()}
    return TeacherRecord(cut, 0, signals, record.hidden_positions[:0])


def _starts(rows, capacity: int, padding_free: bool) -> tuple[list[int], int]:
    """Flat start of every example, and the width of the batch."""
    starts, flat = [], 0
    for number, row in enumerate(rows):
        flat = flat if padding_free else number * capacity
        for example in row:
            starts.append(flat)
            flat += len(example[""].example.token_ids)
    return starts, flat if padding_free else capacity


def _row_units(record: TeacherRecord, start: int, number: int) -> tuple[np.ndarray, ...]:
    example, length = record.example, len(record.example.token_ids)
    at = np.arange(record.first_row, length - 1)  # rows t; what each predicts is at t + 1
    mask = example.loss_mask
    return (
        start + at,  # flat
        np.full(len(at), number),  # example
        _followed(mask)[at],  # answer
        _in_image(example)[at],  # image
        mask[at],  # own_answer
        example.token_ids[at + 1].astype(np.int64),  # labels
    )


def _followed(mask: np.ndarray) -> np.ndarray:
    """bool [tokens]: the token behind this one is under the mask; behind the last is none."""
    return np.append(mask[1:], False)


def _in_image(example: Example) -> np.ndarray:
    inside = np.zeros(len(example.token_ids), dtype=bool)
    for image in example.images:
        if image.start >= 0:  # -1: the architecture has no placeholders
            inside[image.start : image.start + image.length] = True
    return inside


def _teacher(examples, starts: list[int], name: str) -> Teacher:
    records = [example[name] for example in examples]
    for example in examples:
        _check_same_rows(example[""], example[name], name)
    positions = [
        (
            start + record.hidden_positions.astype(np.int64),
            np.full(len(record.hidden_positions), number),
            _followed(record.example.loss_mask)[record.hidden_positions],
            _in_image(record.example)[record.hidden_positions],
        )
        for number, (record, start) in enumerate(zip(records, starts))
    ]
    names = records[0].signals
    signals = {signal: _join([record.signals[signal] for record in records]) for signal in names}
    return Teacher(signals, _units(positions))


def _check_same_rows(main: TeacherRecord, other: TeacherRecord, name: str) -> None:
    # Hidden states alone bring positions of their own.
    has_rows = any(not is_hidden(signal) for signal in other.signals)
    if has_rows and other.first_row != main.first_row:
        raise StudentError(
            f"example {main.example.example_id} has rows from {other.first_row} in cache '{name}'",
            expected=f"rows from {main.first_row} as in train.cache",
            remedy="Capture both with the same loss masks and the same score_images.",
        )


def _units(parts: list[tuple[np.ndarray, ...]]) -> Units:
    return Units(*(_join(list(column)) for column in zip(*parts, strict=True)))


def _join(parts: list[np.ndarray]) -> torch.Tensor:
    joined = np.concatenate(parts)
    # Torch warns of memory that it may not write to.
    return torch.from_numpy(joined if joined.flags.writeable else joined.copy())
