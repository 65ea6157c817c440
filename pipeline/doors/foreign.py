"""Answers that another program kept become a sealed cache, or nothing does.

One idea: the whole source is read and checked before a byte is written; then it is read again and
written. What a format does not hold (tail, log-sum-exp, entropy) is not in the cache either. How
each format spells its answers is in the readers beside this module.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stillroom.cache_schemas.errors import CacheError
from stillroom.cache_schemas.lists import repeated
from stillroom.cache_schemas.manifest import Manifest, Plan
from stillroom.pipeline.cache.storage.protocol import Storage
from stillroom.pipeline.cache.writer import CacheWriter
from stillroom.pipeline.corpus.tokenizer import tokenizer_facts
from stillroom.pipeline.record import Example, TeacherRecord, content_id

TOLERANCE = 1e-3
"""By how much probabilities may exceed 1: rounding of 16-bit log-probabilities."""


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


Reader = Callable[[], Iterator[ForeignAnswer]]
"""Reads a source from its beginning."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a foreign cache is from, as far as is known.

    Attributes:
        form: name of the format.
        teacher: name of the teacher; nothing vouches for it.
        tokenizer: HF directory or hub id of its tokenizer.
        vocab_size: columns of its softmax; 0 takes the tokenizer's size.
        lossy: by how much a row's probabilities may exceed 1 because the format approximates them;
            such rows are scaled to 1.
    """

    form: str
    teacher: str
    tokenizer: str
    vocab_size: int = 0
    lossy: float = 0.0


@dataclass
class _Survey:
    """What the first pass over a source found."""

    count: int = 0
    longest: int = 0
    k: int = 0
    rows: int = 0
    scaled: int = 0
    signals: tuple[str, ...] = ()

    def __post_init__(self):
        self.texts, self.answers = hashlib.sha256(), hashlib.sha256()


def import_answers(
    read: Reader,
    origin: Origin,
    target: str | Storage,
    examples_per_shard: int = 64,
    on_shard: Callable[[int, int], None] = lambda *_: None,
) -> Manifest:
    """Make a sealed cache of a source.

    Args:
        read: from its beginning, twice.
        origin: what is known of it.
        target: directory, URL or storage.
        examples_per_shard: as in `[capture]`.
        on_shard: called with shards done and shards of all.

    Raises:
        CacheError: an answer cannot be right; file and row are named, and nothing is written.
        PlanMismatch: another cache was begun at the target.
    """
    tokenizer = tokenizer_facts(origin.tokenizer)
    vocab_size = origin.vocab_size or tokenizer["vocab_size"]
    survey = _survey(read, origin, vocab_size)
    plan = _plan(survey, origin, tokenizer, vocab_size, examples_per_shard)
    writer = CacheWriter.open(target, plan)
    missing = set(writer.missing())
    answers = read()
    for shard in range(plan.num_shards):
        held = [next(answers) for _ in plan.shard_range(shard)]
        if shard in missing:
            records = [_record(_right(one, origin, vocab_size)[0], plan) for one in held]
            writer.write(shard, records)
        on_shard(shard + 1, plan.num_shards)
    return writer.seal()


def _survey(read: Reader, origin: Origin, vocab_size: int) -> _Survey:
    found = _Survey()
    for answer in read():
        answer, scaled = _right(answer, origin, vocab_size)
        found.count += 1
        found.longest = max(found.longest, len(answer.token_ids))
        found.k = max(found.k, answer.ids.shape[1])
        found.rows += len(answer.ids)
        found.scaled += scaled
        signals = tuple(sorted(answer.more))
        if found.count > 1 and signals != found.signals:
            raise _wrong(answer.where, f"holds {signals}", f"{found.signals} as the rows before")
        found.signals = signals
        found.texts.update(content_id(answer.token_ids, answer.loss_mask).encode())
        for array in (answer.ids, answer.logprobs, *answer.more.values()):
            found.answers.update(np.ascontiguousarray(array).tobytes())
    if not found.count:
        raise CacheError("the source holds no rows", where=origin.form, remedy="Check the path.")
    return found


def _plan(
    survey: _Survey, origin: Origin, tokenizer: Mapping[str, Any], vocab_size: int, per_shard: int
) -> Plan:
    named = {"foreign_name": origin.teacher, "vocab_size": vocab_size}
    facts = {"rows_scaled_to_1": survey.scaled, "answers_sha256": survey.answers.hexdigest()}
    rows = sorted(["topk_ids", "topk_logprobs", *survey.signals])
    return Plan.make(
        teacher=named,
        engine={"name": "foreign", "format": origin.form, "rows": survey.rows, **facts},
        tokenizer=tokenizer,
        corpus={"digest": survey.texts.hexdigest()},
        capture={
            "k": survey.k,
            "profile": "exact",
            "temperatures": [1.0],
            "examples_per_shard": per_shard,
        },
        num_examples=survey.count,
        max_tokens=survey.longest,
        signals={"rows": rows, "dense": {}},
    )


def _right(answer: ForeignAnswer, origin: Origin, vocab_size: int) -> tuple[ForeignAnswer, int]:
    """The answer with its lists in order, and how many rows were scaled to a mass of 1.

    Raises:
        CacheError: it cannot be right.
    """
    ids, logprobs, where = answer.ids, answer.logprobs, answer.where
    wanted = len(answer.token_ids) - 1 - answer.first_row
    if len(answer.token_ids) < 2 or len(ids) != wanted or ids.shape != logprobs.shape:
        raise _wrong(where, f"{len(ids)} rows of answers", f"{wanted}, one for each prediction")
    _check_ids(answer.token_ids, vocab_size, where, "input_ids")
    there = ids >= 0
    _check_ids(ids[there], vocab_size, where, "ids of answers")
    if not there.any(axis=1).all():
        raise _wrong(where, f"row {int(np.argmin(there.any(axis=1)))} has no answer", "some")
    logprobs = np.where(there, logprobs, -np.inf).astype(np.float32)
    if not np.isfinite(logprobs[there]).all() or logprobs.max() > TOLERANCE + origin.lossy:
        row = int(np.argmax(np.where(there & ~np.isfinite(logprobs), np.inf, logprobs).max(axis=1)))
        raise _wrong(where, f"a log-probability of {logprobs[row].max():g} in row {row}", "<= 0")
    order = np.argsort(-logprobs, axis=1, kind="stable")
    ids = np.take_along_axis(np.where(there, ids, -1), order, 1).astype(np.int32)
    logprobs = np.take_along_axis(logprobs, order, 1)
    _check_distinct(ids, where)
    logprobs, scaled = _within_1(logprobs, origin, where)
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


def _within_1(logprobs: np.ndarray, origin: Origin, where: str) -> tuple[np.ndarray, int]:
    mass = np.exp(logprobs.astype(np.float64)).sum(axis=1)  # [R]
    row, largest = int(mass.argmax()), float(mass.max())
    if largest > 1 + TOLERANCE + origin.lossy:
        raise _wrong(where, f"probabilities of row {row} add up to {largest:.4f}", "at most 1")
    over = mass > 1
    scaled = np.where(over[:, None], logprobs - np.log(mass)[:, None], logprobs)
    return np.minimum(scaled, 0.0).astype(np.float32), int(over.sum())


def _check_ids(ids: np.ndarray, vocab_size: int, where: str, what: str) -> None:
    if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
        bad = int(ids[(ids < 0) | (ids >= vocab_size)][0])
        raise _wrong(where, f"{what} hold {bad}", f"0 to {vocab_size - 1}, the vocabulary")


def _check_distinct(ids: np.ndarray, where: str) -> None:
    twice = repeated(ids)
    if twice.any():
        raise _wrong(where, f"row {int(twice.argmax())} names an id twice", "distinct ids")


def _wrong(where: str, found: str, expected: str) -> CacheError:
    return CacheError(
        found,
        expected=expected,
        where=where,
        remedy="Nothing was written. Mend or leave out this row, or name the teacher's own "
        "tokenizer and --vocab-size.",
    )


def _record(answer: ForeignAnswer, plan: Plan) -> TeacherRecord:
    k = plan.facts["capture"]["k"]
    short = ((0, 0), (0, k - answer.ids.shape[1]))
    name = content_id(answer.token_ids, answer.loss_mask)
    example = Example(name, name, "foreign", answer.token_ids, answer.loss_mask)
    signals = {
        "topk_ids": np.pad(answer.ids, short, constant_values=-1),
        "topk_logprobs": np.pad(answer.logprobs, short, constant_values=-np.inf),
        **answer.more,
    }
    return TeacherRecord(example, answer.first_row, signals)
