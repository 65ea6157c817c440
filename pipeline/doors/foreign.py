"""Answers that another program kept become a sealed cache, or nothing does.

One idea: the whole source is read and checked before a byte is written; then it is read again,
found to be the same, and written. What a format does not hold (tail, log-sum-exp, entropy) is not
in the cache either. How each format spells its answers is in the readers beside this module.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stillroom.cache_schemas.errors import CacheError, ConfigError
from stillroom.cache_schemas.manifest import Manifest, Plan
from stillroom.pipeline.cache.storage.protocol import Storage
from stillroom.pipeline.cache.writer import CacheWriter
from stillroom.pipeline.corpus.tokenizer import tokenizer_facts
from stillroom.pipeline.doors.alignment import Alignment
from stillroom.pipeline.doors.foreign_answer import ForeignAnswer, Reader, right
from stillroom.pipeline.doors.foreign_rows import LARGEST_ID, wrong
from stillroom.pipeline.record import Example, TeacherRecord, content_id

AGAIN = 0.05
"""Nats by which the first guesses about one text may differ on average when a teacher is asked
twice: engines round differently in every batch."""


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

    first: str = ""
    count: int = 0
    longest: int = 0
    k: int = 0
    rows: int = 0
    scaled: int = 0
    again: int = 0
    signals: tuple[str, ...] = ()
    alignment: Alignment = field(default_factory=Alignment)

    def __post_init__(self):
        self.texts, self.answers = hashlib.sha256(), hashlib.sha256()

    def digests(self) -> tuple[str, str]:
        """Of the texts and of what was said of them."""
        return self.texts.hexdigest(), self.answers.hexdigest()


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
        ConfigError: a vocabulary that no id of a cache can name.
        PlanMismatch: another cache was begun at the target.
    """
    if origin.vocab_size > LARGEST_ID:
        raise ConfigError(
            f"{origin.vocab_size} columns", expected=f"at most {LARGEST_ID}", where="--vocab-size"
        )
    tokenizer = tokenizer_facts(origin.tokenizer)
    vocab_size = origin.vocab_size or tokenizer["vocab_size"]
    survey = _survey(read, origin, vocab_size)
    plan = _plan(survey, origin, tokenizer, vocab_size, examples_per_shard)
    writer = CacheWriter.open(target, plan)
    missing = set(writer.missing())
    again = _Survey()
    answers = _checked(read, origin, vocab_size, again)
    for shard in range(plan.num_shards):
        held = [one for _, one in zip(plan.shard_range(shard), answers)]
        if shard in missing and len(held) == len(plan.shard_range(shard)):
            writer.write(shard, [_record(one, plan) for one in held])
        on_shard(shard + 1, plan.num_shards)
    if next(answers, None) is not None or again.digests() != survey.digests():
        raise CacheError(
            "the source changed while it was read",
            where=survey.first,
            remedy="Import it again to a new directory when nothing writes it; delete this one.",
        )
    return writer.seal()


def _survey(read: Reader, origin: Origin, vocab_size: int) -> _Survey:
    found = _Survey()
    for answer in _checked(read, origin, vocab_size, found):
        found.alignment.add(answer.token_ids, answer.first_row, answer.ids, answer.logprobs)
    if not found.count:
        raise CacheError("the source holds no rows", where=origin.form, remedy="Check the path.")
    if off := found.alignment.off():
        places, there, own = off
        side = "after" if places > 0 else "before"
        raise wrong(
            found.first,
            f"lists give {own:.2g} to the tokens that they stand for and {there:.2g} to those "
            f"{abs(places)} {side} them, on average over the source",
            "row t about token t + 1",
            "Nothing was written. Give the tokens as the teacher read them (first token included), "
            "or move the lists.",
        )
    return found


def _checked(
    read: Reader, origin: Origin, vocab_size: int, found: _Survey
) -> Iterator[ForeignAnswer]:
    """Answers that can be right, each text once; what was seen is added to `found`."""
    seen: dict[str, tuple[str, float]] = {}
    for given in read():
        answer, scaled = right(given, origin.lossy, vocab_size)
        name, surest = content_id(answer.token_ids, answer.loss_mask), answer.surest()
        where, before = seen.setdefault(name, (answer.where, surest))
        if abs(surest - before) > AGAIN:
            raise wrong(
                answer.where,
                f"is another answer about the text of {where}: first guesses of {surest:.3g} nats "
                f"on average, and {before:.3g} there",
                f"the same to {AGAIN:g}",
            )
        if where != answer.where:
            found.again += 1
            continue
        found.first = found.first or answer.where
        found.count += 1
        found.longest = max(found.longest, len(answer.token_ids))
        found.k = max(found.k, answer.ids.shape[1])
        found.rows += len(answer.ids)
        found.scaled += scaled
        signals = tuple(sorted(answer.more))
        if found.count > 1 and signals != found.signals:
            raise wrong(answer.where, f"holds {signals}", f"{found.signals} as the rows before")
        found.signals = signals
        found.texts.update(name.encode())
        found.answers.update(answer.digest())
        yield answer


def _plan(
    survey: _Survey, origin: Origin, tokenizer: Mapping[str, Any], vocab_size: int, per_shard: int
) -> Plan:
    named = {"foreign_name": origin.teacher, "vocab_size": vocab_size}
    facts = {"rows_scaled_to_1": survey.scaled, "answers_sha256": survey.answers.hexdigest()}
    facts |= {"texts_given_again": survey.again, "own_tokens_likelier": survey.alignment.seen()}
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
