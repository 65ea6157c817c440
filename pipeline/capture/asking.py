"""An engine that is asked what the teacher reads and answers about what the student reads.

One idea: for most corpora both are the same; where they are not, the question is put in front of
the engine and the rows are moved behind it, so that neither the engine nor the cache knows.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from stillroom.pipeline.corpus.privileged import asked, seated
from stillroom.pipeline.record import Example, TeacherRecord
from stillroom.pipeline.teacher.protocol import Reject, stop


class Asking:
    """See `stillroom.pipeline.teacher.protocol`.

    Args:
        engine: answers in the order of what it is given.
    """

    def __init__(self, engine: Any):
        self._engine = engine

    def score(self, examples: Iterable[Example], reject: Reject = stop) -> Iterator[TeacherRecord]:
        """Records about the examples as a student reads them."""
        waiting: deque[Example] = deque()

        def questions() -> Iterator[Example]:
            for example in examples:
                waiting.append(example)
                yield asked(example)

        for record in self._engine.score(questions(), reject):
            example = waiting.popleft()
            assert record.example.example_id == example.example_id
            yield seated(record, example)

    def close(self) -> None:
        """Give back memory and processes."""
        self._engine.close()
