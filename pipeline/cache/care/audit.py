"""Does the cache still say what the teacher says?

One idea: a teacher does not repeat itself exactly, and a cache does not keep exactly what it heard,
so the cache's distance from the live teacher is set beside distances that were measured on the same
examples: live again (batching), live as it would have been stored (the profile), and live in
another precision, where the cache was made by another engine or in another dtype. It starts no
teacher.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from stillroom.pipeline.cache.care.comparing import Differences, differences
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.record import Example, TeacherRecord
from stillroom.pipeline.shares import evenly

Score = Callable[[Sequence[Example]], Iterable[TeacherRecord]]

ROUNDING_KL = 1e-5
"""Mean KL, nats per row, that float32 arithmetic and float32 lists leave."""
NOISE_FACTOR = 3.0
"""How many times the teacher's own noise is still the same teacher."""
STORAGE_FACTOR = 1.5
"""The same of what storing costs, which was measured on the very rows."""


@dataclass(frozen=True, slots=True)
class Audit:
    """The cache's distance from the live teacher, and what explains it.

    Attributes:
        cached: first live answer || cache.
        live: first live answer || second live answer.
        stored: first live answer || the same, stored and read.
        other: first live answer || an answer in another precision; None where not asked for.
        allowed: mean KL of `cached` up to which the cache passes, nats.
    """

    cached: Differences
    live: Differences
    stored: Differences
    other: Differences | None
    allowed: float

    @property
    def passed(self) -> bool:
        """True if the cache is as near to the teacher as storing and noise explain."""
        return self.cached.kl_mean <= self.allowed


def audit(cache: TeacherCache, score: Score, sample: int = 32, other: Score | None = None) -> Audit:
    """Score evenly spaced examples of a cache twice and compare.

    Args:
        score: the live teacher; the second time it gets the examples in reverse order, so that
            they meet other neighbours in a batch.
        other: the same weights in another precision, where engine or dtype are not the cache's:
            two engines in one precision lie about as far apart as one engine in two.
    """
    numbers = evenly(len(cache), sample)
    kept = [cache[number] for number in numbers]
    examples = [record.example for record in kept]
    first = list(score(examples))
    live = differences(zip(first, list(score(examples[::-1]))[::-1]))
    stored = differences(zip(first, (_stored(cache, *pair) for pair in zip(first, kept))))
    apart = differences(zip(first, other(examples))) if other else None
    noise = live.kl_mean + (apart.kl_mean if apart else 0.0)
    allowed = NOISE_FACTOR * noise + STORAGE_FACTOR * stored.kl_mean + ROUNDING_KL
    return Audit(differences(zip(first, kept)), live, stored, apart, allowed)


def _stored(cache: TeacherCache, record: TeacherRecord, kept: TeacherRecord) -> TeacherRecord:
    """A live answer as this cache would hold it; what examples bring comes from the cache."""
    return cache.form.stored(replace(record, signals=kept.signals | record.signals))
