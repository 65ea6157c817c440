"""What every teacher engine promises, its errors, and the checks that all of them share.

One idea: an engine takes Examples and yields TeacherRecords in the order given; which library runs
the model behind it is the caller's explicit choice and changes nothing in the record but noise.
This module knows no engine; `teacher.opening` chooses one.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Literal, Protocol

import numpy as np

from stillroom.cache_schemas.errors import ConfigError, TeacherError
from stillroom.cache_schemas.signals import hidden_name
from stillroom.pipeline.config import Capture
from stillroom.pipeline.record import Example, TeacherRecord
from stillroom.pipeline.teacher.facts import ModelShape
from stillroom.pipeline.teacher.rows import RowSpec, within_nucleus

EngineName = Literal["vllm", "reference"]


class RejectedExample(TeacherError):
    """One example that the teacher cannot answer (too long, wrong ids, NaN logits).

    Attributes:
        example: the example.
    """

    def __init__(self, example: Example, found: str, **more: str):
        self.example = example
        super().__init__(found, where=f"example {example.example_id}", **more)


class OutOfMemory(TeacherError):
    """The model's machine has no room for a step of this size."""


Reject = Callable[[RejectedExample], None]


def stop(error: RejectedExample) -> None:
    """The strictest `Reject`: no example may be without an answer."""
    raise error


class Engine(Protocol):
    """Whatever answers about examples: a language model, or image encoders."""

    def score(self, examples: Iterable[Example], reject: Reject = stop) -> Iterator[TeacherRecord]:
        """One record per example, in the order given.

        Args:
            examples: taken a little ahead of what is asked for.
            reject: told of each example that has no answer; if it returns, an empty record (see
                `empty_record`) stands for that example.

        Raises:
            OutOfMemory: a smaller batch may do; this engine is spent.
        """
        ...

    def close(self) -> None:
        """Give back memory and processes."""
        ...


class TeacherEngine(Engine, Protocol):
    """A running teacher."""

    shape: ModelShape


def check_request(capture: Capture, shape: ModelShape) -> None:
    """Refuse a [capture] table that this model cannot fulfil."""
    if capture.k >= shape.vocab_size:
        raise ConfigError(
            f"k = {capture.k} of a vocabulary of {shape.vocab_size}",
            expected=f"k < {shape.vocab_size}",
            where="[capture] k",
            remedy="Choose a smaller k.",
        )
    if any(not t > 0 or not np.isfinite(t) for t in capture.temperatures):
        raise ConfigError("a temperature is not positive", where="[capture] temperatures")
    for layer in capture.hidden_layers:
        if layer != "final" and not 1 <= layer <= shape.num_layers:
            raise ConfigError(
                f"hidden layer {layer} of a model of {shape.num_layers} blocks",
                expected=f"1 to {shape.num_layers}, or 'final'",
                where="[capture] hidden_layers",
            )


def check_example(example: Example, shape: ModelShape, context: int) -> None:
    """Refuse an example that this model cannot read."""
    length = len(example.token_ids)
    if length < 2 or not example.loss_mask[1:].any():  # no row predicts token 0
        raise RejectedExample(example, "has no token to predict", remedy="Prepare again.")
    if length > context:
        raise RejectedExample(
            example,
            f"{length} tokens, longer than the teacher can score",
            expected=f"at most {context} tokens",
            remedy="Prepare with a smaller window.",
        )
    largest = int(example.token_ids.max())
    if largest >= shape.vocab_size or int(example.token_ids.min()) < 0:
        raise RejectedExample(
            example,
            f"token id {largest} is outside the teacher's vocabulary",
            expected=f"ids from 0 to {shape.vocab_size - 1}",
            remedy="The corpus was made with another tokenizer: prepare again with the teacher's.",
        )


def check_finite(example: Example, first_row: int, signals: dict[str, np.ndarray]) -> None:
    """Refuse an answer with NaN or infinite logits, naming the position."""
    bad = ~np.isfinite(signals["lse"]).all(axis=1) | ~np.isfinite(signals["token_logprob"])  # [R]
    bad |= ~np.isfinite(signals["topk_logprobs"]).all(axis=1)
    if bad.any():
        position = first_row + int(np.argmax(bad))
        raise RejectedExample(
            example,
            f"NaN or infinite logits at position {position}",
            remedy="Check the weights; try dtype = 'float32' or 'bfloat16' under [teacher].",
        )


def record_of(
    example: Example, capture: Capture, first_row: int, signals: dict[str, np.ndarray]
) -> TeacherRecord:
    """The record of an answer, whichever engine it came from.

    Args:
        signals: rows and hidden states as the teacher gave them; changed in place.

    Raises:
        RejectedExample: NaN or infinite logits.
    """
    check_finite(example, first_row, signals)  # before the nucleus puts -inf on purpose
    within_nucleus(signals, capture.nucleus)
    signals |= given_signals(example, first_row)
    return TeacherRecord(example, first_row, signals, hidden_positions(example, capture))


def empty_record(example: Example, capture: Capture, shape: ModelShape) -> TeacherRecord:
    """Stands for an example without an answer: its first token alone, and no rows."""
    nothing = np.zeros(1, dtype=bool)
    cut = replace(example, token_ids=example.token_ids[:1], loss_mask=nothing, images=())
    spec = RowSpec.of(capture)
    ints = np.empty((0, spec.int_columns), dtype=np.int32)
    signals = spec.unpack(ints, np.empty((0, spec.float_columns), dtype=np.float32))
    for layer in capture.hidden_layers:
        signals[hidden_name(layer)] = np.empty((0, shape.hidden_size), dtype=np.float32)
    return TeacherRecord(cut, 0, signals | given_signals(cut, 0))


def given_signals(example: Example, first: int) -> dict[str, np.ndarray]:
    """Signals of the rows from `first` on that the example brings with it."""
    if example.behaviour_logprob is None:
        return {}
    # Row t is about token t + 1.
    kept = example.behaviour_logprob[first + 1 : len(example.token_ids)]
    return {"behaviour_logprob": np.asarray(kept, dtype=np.float32)}


def first_row(example: Example, capture: Capture) -> int:
    """First row to score: the one that predicts the first target, or, where images are to be
    scored too, the first placeholder if that comes before it."""
    if not (capture.score_images and example.images):
        return example.first_row
    # An architecture without placeholders says -1.
    return min(example.first_row, max(example.images[0].start, 0))


def hidden_positions(example: Example, capture: Capture) -> np.ndarray:
    """int32 [P]: positions whose hidden states are kept.

    They are scored rows, because row t and the state at t predict the same token: all of them, or
    (`answer`) those that predict a token under the loss mask, then every `hidden_stride`-th.
    """
    if not capture.hidden_layers:
        return np.empty(0, dtype=np.int32)
    if capture.hidden_rows == "answer":
        rows = np.flatnonzero(example.loss_mask[1:])  # row t predicts token t + 1
    else:
        rows = np.arange(first_row(example, capture), len(example.token_ids) - 1)
    return rows[:: capture.hidden_stride].astype(np.int32)
