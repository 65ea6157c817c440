"""How far two answers to the same examples lie apart: two caches, or a cache and a live teacher.

One idea: two top-k lists rarely hold the same ids, so rows are compared on the ids both list and on
three outcomes more: what only the first lists, only the second, and neither. An id that a side does
not list has at most the mass of its least listed one there; within that, the unknown mass is placed
where it makes the divergence small. So the result leans to the low side, is exact where the lists
agree, and large where they are strangers. Records of draws alone (k = 0) have no list: the token
that followed and its log-probability stand for one.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.record import TeacherRecord
from stillroom.pipeline.shares import evenly

FLOOR = 1e-12
"""Least mass of the remaining outcome; rounding may leave it at or below zero."""


@dataclass(slots=True)
class Differences:
    """Divergence over rows, and whatever else differs.

    Attributes:
        kl: KL(first || second) of every row, nats.
        top1: share of rows whose most probable id agrees; NaN where none is known.
        logprob: largest |difference| of a log-probability that both list, nats.
        hidden: dense signal -> mean squared difference over mean square.
        examples: examples compared.
    """

    kl: np.ndarray
    top1: float
    logprob: float
    hidden: dict[str, float]
    examples: int

    @property
    def kl_mean(self) -> float:
        """Mean over rows."""
        return float(self.kl.mean()) if self.kl.size else 0.0

    @property
    def kl_max(self) -> float:
        """Largest of a row."""
        return float(self.kl.max()) if self.kl.size else 0.0


@dataclass(slots=True)
class CacheDifferences:
    """What `diff` finds.

    Attributes:
        plan: one sentence per fact that differs (found: the second's; expected: the first's).
        only_first, only_second: examples that the other lacks.
        shared: examples in both.
        values: how far sampled shared examples lie apart; None where none is shared.
    """

    plan: list[str]
    only_first: int
    only_second: int
    shared: int
    values: Differences | None = field(default=None)


def diff(first: TeacherCache, second: TeacherCache, sample: int = 200) -> CacheDifferences:
    """Compare two caches by plan, by examples and, on evenly spaced shared ones, by value."""
    mine, theirs = _numbers(first), _numbers(second)
    shared = sorted(mine.keys() & theirs.keys(), key=mine.__getitem__)
    found = CacheDifferences(
        plan=first.plan.differences(second.plan),
        only_first=len(mine) - len(shared),
        only_second=len(theirs) - len(shared),
        shared=len(shared),
    )
    picked = [shared[i] for i in evenly(len(shared), sample)]
    if picked:
        pairs = ((first[mine[example]], second[theirs[example]]) for example in picked)
        found.values = differences(pairs)
    return found


def differences(pairs: Iterable[tuple[TeacherRecord, TeacherRecord]]) -> Differences:
    """Compare records of the same examples, pair by pair."""
    kl: list[np.ndarray] = []
    agree, furthest, examples = [np.empty(0, dtype=bool)], 0.0, 0
    energy: dict[str, np.ndarray] = {}
    for first, second in pairs:
        examples += 1
        if first.num_rows == second.num_rows and first.num_rows and _both(first, second):
            row_kl, logprob = row_divergence(first, second)
            kl.append(row_kl)
            furthest = max(furthest, logprob)
            if all(record.signals["topk_ids"].shape[1] for record in (first, second)):
                agree.append(first.signals["topk_ids"][:, 0] == second.signals["topk_ids"][:, 0])
        for name, sums in _energies(first, second):
            energy[name] = energy.get(name, np.zeros(2)) + sums
    every = np.concatenate(kl) if kl else np.empty(0)
    hidden = {name: float(sums[0] / max(sums[1], FLOOR)) for name, sums in sorted(energy.items())}
    tops = np.concatenate(agree)
    top1 = float(tops.mean()) if tops.size else float("nan")
    return Differences(every, top1, furthest, hidden, examples)


def row_divergence(first: TeacherRecord, second: TeacherRecord) -> tuple[np.ndarray, float]:
    """KL(first || second) of every row [R] in nats, and the largest |difference| of log p."""
    (ids, logprobs), (others, other_logprobs) = _listed(first), _listed(second)
    same = (ids[:, :, None] == others[:, None, :]) & (ids >= 0)[:, :, None]  # [R, k, n]
    row, column, other = np.nonzero(same)
    log_p, log_q = logprobs[row, column], other_logprobs[row, other]
    p, q = (np.bincount(row, np.exp(log), len(ids)) for log in (log_p, log_q))
    kl = np.bincount(row, np.exp(log_p) * (log_p - log_q), len(ids))
    kl = kl + _outside(_Rest(first, p, same.any(axis=2)), _Rest(second, q, same.any(axis=1)))
    furthest = float(np.abs(log_p - log_q).max()) if log_p.size else 0.0
    return np.maximum(kl, 0.0), furthest  # rounding may leave it a little below


class _Rest:
    """The part of one side's rows that the other side does not list.

    Attributes:
        listed: mass [R] of the ids that only this side lists.
        unlisted: mass [R] of the ids that this side does not list.
        share: `listed` over both.
        least: bound [R] on the mass here of one id that is not listed.
        count: how many ids [R] only this side lists.
    """

    def __init__(self, record: TeacherRecord, common: np.ndarray, shared: np.ndarray):
        ids, logprobs = _listed(record)
        held = ids >= 0
        mass = np.where(held, np.exp(logprobs), 0)
        self.listed = np.maximum(mass.sum(axis=1) - common, 0)
        self.unlisted = np.maximum(1 - mass.sum(axis=1), FLOOR)
        self.share = self.listed / (self.listed + self.unlisted)
        self.least = np.where(held, mass, 1).min(axis=1, initial=1)
        self.count = (held & ~shared).sum(axis=1)


def _listed(record: TeacherRecord) -> tuple[np.ndarray, np.ndarray]:
    """(ids, float64 log-probabilities) [R, n] of a record's lists, or of its following tokens."""
    ids, logprobs = record.signals["topk_ids"], record.signals["topk_logprobs"]
    if not ids.shape[1] and "token_logprob" in record.signals:
        ids = record.example.token_ids[record.first_row + 1 :, None]
        logprobs = record.signals["token_logprob"][:, None]
    return ids, logprobs.astype(np.float64)


def _outside(p: _Rest, q: _Rest) -> np.ndarray:
    """KL over three outcomes: listed by p alone, by q alone, by neither."""
    q_there = np.minimum(p.count * q.least, q.unlisted * p.share)
    p_there = np.minimum(q.count * p.least, p.unlisted * q.share)
    neither = _term(p.unlisted - p_there, q.unlisted - q_there)
    return _term(p.listed, q_there) + _term(p_there, q.listed) + neither


def _term(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    p, q = np.maximum(p, 0), np.maximum(q, FLOOR)
    return p * np.log(np.maximum(p, FLOOR) / q)


def _numbers(cache: TeacherCache) -> dict[str, int]:
    ids = cache.index(["example_id"]).column("example_id").to_pylist()
    # Backwards, so that of a repeated example the first counts.
    return {example: number for number, example in reversed(list(enumerate(ids)))}


def _both(first: TeacherRecord, second: TeacherRecord) -> bool:
    return all("topk_ids" in record.signals for record in (first, second))


def _energies(first: TeacherRecord, second: TeacherRecord) -> Iterable[tuple[str, np.ndarray]]:
    """Dense signal -> (squared difference, square), summed."""
    for name in first.signals.keys() & second.signals.keys():
        mine, theirs = first.signals[name], second.signals[name]
        if "." in name and mine.shape == theirs.shape:  # dense signals alone have a dot
            change = np.square(mine.astype(np.float64) - theirs).sum()
            yield name, np.array([change, np.square(mine.astype(np.float64)).sum()])
