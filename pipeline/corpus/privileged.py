"""A teacher that is asked in other words than the student: another prompt before the same answer.

One idea: the two conversations are rendered side by side, and must be the same tokens from the
first that is learned on; what stands before it for the teacher is kept beside the student's
example. The teacher is asked with that, and its rows, which are about the same tokens, are moved
to where these stand for the student. A pair that differs in what is learned is refused.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from stillroom.cache_schemas.errors import CorpusError
from stillroom.cache_schemas.signals import is_hidden
from stillroom.pipeline.corpus.documents import Document
from stillroom.pipeline.record import Example, TeacherRecord

Make = Callable[[Document], Sequence[Any]]
Prompts = Iterable[np.ndarray | None]
"""What the teacher reads before each example's first learned token; None where the student's."""


def teacher_prompts(
    document: Document, made: Sequence[Any], make: Make
) -> Iterator[np.ndarray | None]:
    """What the teacher is asked with, for each example that was made of a conversation.

    Args:
        document: with the teacher's own messages, or without.
        made: the student's examples of it.
        make: document -> examples.

    Yields:
        int32 ids that stand before the first learned token; None where both read the same.

    Raises:
        CorpusError: the teacher's conversation is another one from there on.
    """
    if not document.teacher_messages:
        yield from [None] * len(made)
        return
    if document.images:
        raise _other(document, "it shows images", "texts alone")
    told = make(replace(document, messages=document.teacher_messages, teacher_messages=()))
    if len(told) != len(made):
        raise _other(document, f"it makes {len(told)} examples", f"{len(made)}")
    for own, (ids, mask, *_) in zip(made, told, strict=True):
        start, other = _first(own[1]), _first(mask)
        same = np.array_equal(own[0][start:], ids[other:])
        if not (same and np.array_equal(own[1][start:], mask[other:])):
            raise _other(document, "its answers are other tokens", "those of messages_column")
        yield np.asarray(ids[:other], dtype=np.int32)


def _other(document: Document, found: str, expected: str) -> CorpusError:
    return CorpusError(
        f"the teacher's conversation does not go with the student's: {found}",
        expected=expected,
        where=document.where,
        remedy="From the first answer on, both columns must say the same, inside the window; where "
        "they do and the teacher's is longer than that, raise [prepare] window.",
    )


def _first(mask: np.ndarray) -> int:
    """The first learned token."""
    return int(np.argmax(mask))


def asked(example: Example) -> Example:
    """The example as the teacher reads it, under the same id."""
    prompt = example.teacher_prompt
    if prompt is None:
        return example
    start = _first(example.loss_mask)
    return replace(
        example,
        token_ids=np.concatenate([prompt, example.token_ids[start:]]).astype(np.int32),
        loss_mask=np.concatenate([np.zeros(len(prompt), dtype=bool), example.loss_mask[start:]]),
        teacher_prompt=None,
    )


def seated(record: TeacherRecord, example: Example) -> TeacherRecord:
    """What the teacher said about an example as it was asked, at the student's places.

    Args:
        record: of `asked(example)`; its rows begin with the one about the first learned token, or
            it is empty.
        example: as the student reads it.
    """
    prompt = example.teacher_prompt
    if prompt is None:
        return record
    moved = len(prompt) - _first(example.loss_mask)
    kept = record.hidden_positions >= record.example.first_row
    signals = {
        name: array[kept] if is_hidden(name) else array for name, array in record.signals.items()
    }
    return replace(
        record,
        example=replace(example, teacher_prompt=None),
        first_row=record.first_row - moved,
        signals=signals,
        hidden_positions=(record.hidden_positions[kept] - moved).astype(np.int32),
    )
