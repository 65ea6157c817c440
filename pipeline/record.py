"""Example and TeacherRecord: the two values that travel.

One idea: what the writer takes is what the reader returns, so a round trip is one property.
This module holds values only; it does no input or output.
"""

import hashlib
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """One image of an example: its content hash and its placeholder positions.

    Attributes:
        sha256: hex digest of the image file's bytes.
        start: first placeholder position in `token_ids`; -1 where the architecture has none.
        length: number of placeholder positions; 0 where the architecture has none.
    """

    sha256: str
    start: int = -1
    length: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """What the teacher is asked about.

    Attributes:
        example_id: content hash (see `content_id`), 32 hex digits.
        document_id: the document it was cut from; held-out splits never share one.
        source: name of the corpus source.
        token_ids: int32 [L].
        loss_mask: bool [L]; True where the token is one a student learns to predict.
        images: spans in order of appearance.
        weight: sample weight for training.
        behaviour_logprob: float32 [L], for text that a model wrote: log probability, in nats, with
            which each token was drawn; 0 where it was given. Not part of the identity: a cache
            keeps it as the signal of that name.
        teacher_prompt: int32 [P], what the teacher reads in place of the tokens before the first
            that is learned; None where it reads the same. A cache holds what the student reads.
    """

    example_id: str
    document_id: str
    source: str
    token_ids: np.ndarray
    loss_mask: np.ndarray
    images: tuple[ImageSpan, ...] = ()
    weight: float = 1.0
    behaviour_logprob: np.ndarray | None = None
    teacher_prompt: np.ndarray | None = None

    @property
    def first_row(self) -> int:
        """First row worth scoring: the one that predicts the first token under the mask."""
        return max(int(np.argmax(self.loss_mask)) - 1, 0)  # row t predicts token t + 1

    @property
    def num_rows(self) -> int:
        """Rows from `first_row` to L-2."""
        return len(self.token_ids) - 1 - self.first_row

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Example) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self.example_id)

    def _key(self) -> tuple:
        tokens, mask = self.token_ids.tobytes(), self.loss_mask.tobytes()
        return (
            self.example_id,
            self.document_id,
            self.source,
            tokens,
            mask,
            self.images,
            self.weight,
        )


def content_id(
    token_ids: np.ndarray, loss_mask: np.ndarray, images: tuple[ImageSpan, ...] = ()
) -> str:
    """The first 32 hex digits of sha256 over tokens (int32), mask (uint8) and image hashes."""
    digest = hashlib.sha256(np.ascontiguousarray(token_ids, dtype="<i4").tobytes())
    digest.update(np.ascontiguousarray(loss_mask, dtype=np.uint8).tobytes())
    for image in images:
        digest.update(f"{image.sha256}:{image.start}:{image.length}".encode())
    return digest.hexdigest()[:32]


@dataclass(frozen=True, slots=True, eq=False)
class TeacherRecord:
    """What the teacher said about one example.

    Attributes:
        example: the example it is about.
        first_row: first scored row; signals with axis `row` hold rows `first_row .. L-2`
            (R = L - 1 - first_row of them).
        signals: name -> array, as listed in `cache_schemas.signals`. Hidden states have one entry
            per position in `hidden_positions`.
        hidden_positions: int32 [P] token positions of the hidden states; empty when there are none.
    """

    example: Example
    first_row: int
    signals: dict[str, np.ndarray] = field(default_factory=dict)
    hidden_positions: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int32))

    @property
    def num_rows(self) -> int:
        """R, the number of scored rows; 0 where there are no tokens (image targets)."""
        return max(len(self.example.token_ids) - 1 - self.first_row, 0)
