"""The signals of a teacher: their names, axes, shapes and the alignment rule.

One idea: every array in a cache has one name, and its name fixes its dtype, its axis and its
meaning. This module says which arrays exist; it does not compute, encode or store them.

**Alignment rule, written once.** Row t describes the prediction made *after* token t, so row t
is about token t+1. L tokens have L-1 rows. A record keeps the rows `first_row .. L-2`.
Probabilities are of the full softmax over the real vocabulary, never renormalised to the stored
ids; what lies outside the stored ids is `tail_logprob`.
"""

from dataclasses import dataclass
from typing import Literal

Axis = Literal["row", "token", "example", "image", "item"]


@dataclass(frozen=True, slots=True)
class Signal:
    """One named array of a record.

    Attributes:
        name: key in `TeacherRecord.signals`.
        axis: what the first dimension counts. `row` follows the alignment rule; `token` has one
            entry per kept token position of the example; an `example` signal is one list for the
            whole example.
        dtype: NumPy dtype of the array that the reader returns.
        shape: sizes after the first dimension, as words (`k`, `draws`, `temperatures`, `width`);
            of an `example` signal the length of its list (`candidates`, or `tokens` for any).
        meaning: one sentence, with units.
    """

    name: str
    axis: Axis
    dtype: str
    shape: tuple[str, ...]
    meaning: str


ROW_SIGNALS: dict[str, Signal] = {
    s.name: s
    for s in (
        Signal("topk_ids", "row", "int32", ("k",), "ids by falling probability; -1 pads"),
        Signal("topk_logprobs", "row", "float32", ("k",), "full-softmax log p, nats; -inf pads"),
        Signal("tail_logprob", "row", "float32", (), "log of the mass outside topk_ids, nats"),
        Signal("token_logprob", "row", "float32", (), "log p of the token that follows, nats"),
        Signal("token_rank", "row", "int32", (), "1 + number of ids more probable than it"),
        Signal("entropy", "row", "float32", (), "-sum p log p over the vocabulary, nats"),
        Signal("lse", "row", "float32", ("temperatures",), "log sum exp(z / T), one per T"),
        Signal("logit_mean", "row", "float32", (), "mean of the raw logits"),
        Signal("logit_std", "row", "float32", (), "population standard deviation of the logits"),
        Signal("zscore_lse", "row", "float32", (), "log sum exp((z - mean) / (1e-7 + std))"),
        Signal("draw_ids", "row", "int32", ("draws",), "distinct ids drawn from the tail; -1 pads"),
        Signal("draw_counts", "row", "int32", ("draws",), "times each was drawn; 0 pads"),
        Signal("behaviour_logprob", "row", "float32", (), "log b of a generated token, nats"),
    )
}

EXAMPLE_SIGNALS: dict[str, Signal] = {
    s.name: s
    for s in (
        Signal(
            "candidate_ids",
            "example",
            "int32",
            ("candidates",),
            "places in the catalogue of the teacher's best items, best first; -1 pads",
        ),
        Signal(
            "candidate_distances",
            "example",
            "float32",
            ("candidates",),
            "rising: L2 distance, or -log p in nats (the plan says which); inf pads",
        ),
        Signal("written_ids", "example", "int32", ("tokens",), "tokens the teacher wrote"),
    )
}

ITEM_PREFIX = "item."
"""`item.<layer>` is an item's embedding [1, width], keyed by the hash of the item's content."""

HIDDEN_PREFIX = "hidden."
"""`hidden.12` is the output of block 12 (1-based) [positions, width]; `hidden.final` is the state
after the final norm, the one the LM head reads."""

IMAGE_PREFIX = "image."
"""`image.<encoder>` is a vision target [patches, width], keyed by image content hash."""
IMAGE_ERROR = "image_error"
"""What the vision targets of an image lost by being stored, [encoders, 1] in the order of their
names: squared error divided by squared norm. No positions where an image has no targets."""


def hidden_name(layer: int | str) -> str:
    """Signal name of a hidden layer: an int (block output) or `"final"` (post-norm)."""
    return f"{HIDDEN_PREFIX}{layer}"


def is_hidden(name: str) -> bool:
    """True for dense per-token signals."""
    return name.startswith(HIDDEN_PREFIX)
