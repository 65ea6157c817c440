"""Does the cache still say what the teacher says?

One idea: a teacher does not repeat itself exactly (batching, kernels, precision), so the cache is
judged against the teacher's distance from itself: the same examples are scored twice, and the
cache's distance from the first answer is set beside the second's. It starts no teacher.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from stillroom.pipeline.cache.care.comparing import Differences, differences
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.record import Example, TeacherRecord
from stillroom.pipeline.shares import evenly

Score = Callable[[Sequence[Example]], Iterable[TeacherRecord]]

STORAGE_KL = {"exact": 1e-5, "portable": 1e-5}
"""Mean KL, nats per row, that storing may add to the teacher's own noise."""
LOSSY_STORAGE_KL = 2e-4
NOISE_FACTOR = 3.0
"""How many times the teacher's own noise is still the same teacher."""


@dataclass(frozen=True, slots=True)
class Audit:
    """Cache against live, and live against live.

    Attributes:
        cached: first live answer || cache.
        live: first live answer || second live answer.
        allowed: mean KL of `cached` up to which the cache passes, nats.
    """

    cached: Differences
    live: Differences
    allowed: float

    @property
    def passed(self) -> bool:
        """True if the cache is as near to the teacher as storing and noise explain."""
        return self.cached.kl_mean <= self.allowed


def audit(cache: TeacherCache, score: Score, sample: int = 32) -> Audit:
    """Score evenly spaced examples of a cache twice and compare.

    Args:
        score: the live teacher; the second time it gets the examples in reverse order, so that
            they meet other neighbours in a batch.
    """
    numbers = evenly(len(cache), sample)
    stored = [cache[number] for number in numbers]
    examples = [record.example for record in stored]
    first = list(score(examples))
    second = list(score(examples[::-1]))[::-1]
    live = differences(zip(first, second))
    profile = cache.plan.facts["capture"].get("profile", "")
    allowed = NOISE_FACTOR * live.kl_mean + STORAGE_KL.get(profile, LOSSY_STORAGE_KL)
    return Audit(differences(zip(first, stored)), live, allowed)
