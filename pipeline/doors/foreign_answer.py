"""What another program kept of a teacher's answer to one text, and whether it can be right.

One idea: every rule is about one answer alone and names its file, row and value; lists come out of
it in order and with a mass of at most 1. Where answers are from, and what becomes of them, is not
known here.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from stillroom.cache_schemas.lists import repeated
from stillroom.pipeline.doors.foreign_rows import NOTHING, wrong

TOLERANCE = 1e-3
"""By how much probabilities may exceed 1: rounding of 16-bit log-probabilities."""
SAME = 0.02
"""Nats by which two figures of one token may differ: rounding to two digits, or to 16 bits."""


@dataclass(frozen=True, slots=True)
class ForeignAnswer:
    """What a teacher said about one text, as a reader found it.

    Attributes:
        where: file and row, for messages.
        token_ids: int32 [L].
        loss_mask: bool [L].
        first_row: the row that `ids[0]` is about; row t predicts token t + 1.
        ids: int32 [R, k]; -1 where a row has fewer.
        logprobs: float32 [R, k], of the full softmax; -inf where a row has fewer.
        more: further row signals that the format holds.
    """

    where: str
    token_ids: np.ndarray
    loss_mask: np.ndarray
    first_row: int
    ids: np.ndarray
    logprobs: np.ndarray
    more: dict[str, np.ndarray] = field(default_factory=dict)

    def surest(self) -> float:
        """Mean log-probability of the first guesses, in nats."""
        return float(self.logprobs[:, 0].mean())

    def digest(self) -> bytes:
        """sha256 of what was said."""
        found = hashlib.sha256()
        for array in (self.ids, self.logprobs, *self.more.values()):
            found.update(np.ascontiguousarray(array).tobytes())
        return found.digest()


Reader = Callable[[], Iterator[ForeignAnswer]]
"""Reads a source from its beginning."""


def right(answer: ForeignAnswer, lossy: float, vocab_size: int) -> tuple[ForeignAnswer, int]:
    """The answer with its lists in order, and how many rows were scaled to a mass of 1.

    Args:
        answer: as a reader found it.
        lossy: by how much a row's probabilities may exceed 1 because the format approximates them.
        vocab_size: columns of the teacher's softmax.

    Raises:
        CacheError: it cannot be right.
    """
    ids, logprobs, where = answer.ids, answer.logprobs, answer.where
    wanted = len(answer.token_ids) - 1 - answer.first_row
    if wanted < 1:
        raise wrong(where, f"{len(answer.token_ids)} tokens, none of which is predicted", "some")
    if len(ids) != wanted or ids.shape != logprobs.shape:
        raise wrong(where, f"{len(ids)} rows of answers", f"{wanted}, one for each prediction")
    if answer.loss_mask[1 : answer.first_row + 1].any():
        raise wrong(where, "tokens to be learned before the first answer", "an answer for each")
    _check_ids(answer.token_ids, vocab_size, where, "input_ids")
    there = ids >= 0
    _check_ids(ids[ids != -1], vocab_size, where, "ids of answers")
    if not there.any(axis=1).all():
        raise wrong(where, f"row {int(np.argmin(there.any(axis=1)))} has no answer", "some")
    logprobs = np.where(there, logprobs, -np.inf).astype(np.float32)
    _check_nats(logprobs, there, TOLERANCE + lossy, where)
    order = np.argsort(-logprobs, axis=1, kind="stable")
    ids = np.take_along_axis(np.where(there, ids, -1), order, 1).astype(np.int32)
    logprobs = np.take_along_axis(logprobs, order, 1)
    _check_distinct(ids, where)
    _check_own(answer, ids, logprobs, vocab_size)
    logprobs, scaled = _within_1(logprobs, lossy, where)
    made = ForeignAnswer(
        where,
        answer.token_ids.astype(np.int32),
        answer.loss_mask,
        answer.first_row,
        ids,
        logprobs,
        answer.more,
    )
    return made, scaled


def _within_1(logprobs: np.ndarray, lossy: float, where: str) -> tuple[np.ndarray, int]:
    mass = np.exp(logprobs.astype(np.float64)).sum(axis=1)  # [R]
    row, largest = int(mass.argmax()), float(mass.max())
    if largest > 1 + TOLERANCE + lossy:
        raise wrong(where, f"probabilities of row {row} add up to {largest:.4f}", "at most 1")
    over = mass > 1
    scaled = np.where(over[:, None], logprobs - np.log(mass)[:, None], logprobs)
    return np.minimum(scaled, 0.0).astype(np.float32), int(over.sum())


def _check_nats(values: np.ndarray, there: np.ndarray, slack: float, where: str) -> None:
    """Refuse what is no log-probability."""
    bad = there & ~(np.isfinite(values) & (values <= slack))
    if bad.any():
        row = int(bad.reshape(len(bad), -1).any(axis=1).argmax())
        found = float(values[row][bad[row]].ravel()[0])
        raise wrong(where, f"a log-probability of {found:g} in row {row}", "<= 0")


def _check_own(
    answer: ForeignAnswer, ids: np.ndarray, logprobs: np.ndarray, vocab_size: int
) -> None:
    """Refuse what is said of the token that follows where the list of its row says another thing:
    one of the two is of another row."""
    if "token_logprob" not in answer.more:
        return
    own, where = answer.more["token_logprob"], answer.where
    _check_nats(own, np.ones(len(own), dtype=bool), TOLERANCE, where)
    listed = ids == answer.token_ids[answer.first_row + 1 :, None]
    least = np.where(ids >= 0, logprobs, np.inf).min(axis=1)
    most = np.where(listed.any(axis=1), np.where(listed, logprobs, -np.inf).max(axis=1), least)
    wrong_rows = (own > most + SAME) | (listed.any(axis=1) & (own < most - SAME))
    if wrong_rows.any():
        row = int(wrong_rows.argmax())
        raise wrong(
            where,
            f"the token of row {row} has a log-probability of {own[row]:g}, and its list says "
            f"{'' if listed[row].any() else 'at most '}{most[row]:g}",
            "the same",
        )
    ranks = answer.more.get("token_rank", np.ones(1))
    if ranks.min() < 1 or ranks.max() > vocab_size:
        raise wrong(where, f"ranks {ranks.min()} to {ranks.max()}", f"1 to {vocab_size}")


def _check_ids(ids: np.ndarray, vocab_size: int, where: str, what: str) -> None:
    if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
        bad = int(ids[(ids < 0) | (ids >= vocab_size)][0])
        expected = f"0 to {vocab_size - 1}, the vocabulary"
        remedy = f"{NOTHING}, or name the teacher's own tokenizer and --vocab-size."
        raise wrong(where, f"{what} hold {bad}", expected, remedy)


def _check_distinct(ids: np.ndarray, where: str) -> None:
    twice = repeated(ids)
    if twice.any():
        raise wrong(where, f"row {int(twice.argmax())} names an id twice", "distinct ids")
