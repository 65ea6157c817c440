"""`[student] leave_out`: a run's own measurement of which blocks its student goes without.

One idea: nothing is measured twice. Every pass is kept in a directory when it is done (the run's,
or one that several runs share), under the digest of teacher and text, and what came of them in the
receipt of the initial student; so a run that was interrupted goes on, and one that has lost its
corpus measures nothing again. How it is measured is `leaving_out`'s.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from stillroom.pipeline.cache.storage.directory import DirectoryStorage
from stillroom.pipeline.config import Teacher
from stillroom.pipeline.config.training import Student
from stillroom.pipeline.corpus.preparing import Corpus
from stillroom.pipeline.corpus.splits import canonical_json
from stillroom.pipeline.record import Example
from stillroom.pipeline.shares import evenly
from stillroom.pipeline.student.leaving_out import LeftOut, Progress, least_missed
from stillroom.pipeline.student.model import load_source, source_facts
from stillroom.pipeline.student.saving import RECEIPT
from stillroom.pipeline.student.states import blocks_of
from stillroom.pipeline.whole_text import write_whole

FILE = "blocks-measured.json"
"""KL of every pass that is done."""
LOCK = "blocks-measured.lock"
"""Held by the process that measures, so that another waits for its passes and makes none twice."""
LOOKED_AT = 64
"""Examples whose lengths say how many make up the tokens that are wanted."""


def with_blocks_chosen(
    student: Student,
    teacher: Teacher | None,
    corpus: Path,
    initial: Path,
    passes: Path,
    on_progress: Progress | None = None,
) -> Student:
    """The table with `keep_layers` for its `leave_out`; any other as it is.

    Args:
        corpus: directory of the prepared corpus, on whose text it is measured.
        initial: of the initial student; where that is made already, its own blocks are taken.
        passes: directory where passes are kept.
        on_progress: as of `least_missed`.

    Raises:
        CorpusError: there is no corpus, and nothing was measured before.
        StudentError: no block would be left.
    """
    if not student.leave_out:
        return student
    receipt = initial / RECEIPT
    if receipt.exists():
        kept = json.loads(receipt.read_text())["student"].get("keep_layers", ())
    elif teacher is None:
        return student  # who makes the student says that there is nothing to make it from
    else:
        kept, _ = measured_blocks(student, teacher, corpus, passes, on_progress)
    return student.model_copy(update={"keep_layers": tuple(kept)})


def measured_blocks(
    student: Student,
    teacher: Teacher,
    corpus: Path,
    directory: Path,
    on_progress: Progress | None = None,
) -> tuple[list[int], list[LeftOut]]:
    """Blocks to keep, ascending, and those that go in the order in which they were chosen.

    Args:
        student: its `leave_out`, and `leave_out_tokens` of training text: whole examples, evenly
            spread, one at least.
        corpus: directory of the prepared corpus.
        directory: where passes are kept as they are done.
        on_progress: as of `least_missed`.
    """
    texts = Corpus.open(corpus).split("train")
    lengths = [len(texts[number].token_ids) for number in evenly(len(texts), LOOKED_AT)]
    wanted = max(1, round(student.leave_out_tokens * len(lengths) / sum(lengths)))
    examples = [texts[number] for number in evenly(len(texts), wanted)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_source(student, teacher).eval().to(device)
    count, facts = student.leave_out, source_facts(student, teacher)
    with _alone(directory):
        passes = _Passes(directory / FILE, facts, examples)
        gone = least_missed(model, examples, count, on_progress, passes.known, passes.add)
    without = {left.block for left in gone}
    return [n for n in range(len(blocks_of(model))) if n not in without], gone


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Within it nobody else measures here; a lock goes with its process, so none is waited for in
    vain."""
    storage = DirectoryStorage(directory)
    while (claim := storage.claim(LOCK)) is None:
        time.sleep(1.0)
    try:
        yield
    finally:
        claim.release()


class _Passes:
    """A file of measured passes; one of another teacher or text is begun anew.

    Attributes:
        known: blocks left out, ascending -> KL.
    """

    def __init__(self, path: Path, teacher: dict, examples: Sequence[Example]):
        self._path = path
        about = canonical_json([teacher, [one.example_id for one in examples]])
        self._of = hashlib.sha256(about).hexdigest()
        self.known = self._read() if path.is_file() else {}

    def _read(self) -> dict[tuple[int, ...], float]:
        try:
            found = json.loads(self._path.read_text())
            passes = found["passes"] if found["of"] == self._of else []
            return {tuple(gone): float(kl) for gone, kl in passes}
        except (ValueError, TypeError, KeyError):  # not as we write it: measured again
            return {}

    def add(self, gone: tuple[int, ...], kl: float) -> None:
        """Keep one more."""
        self.known[gone] = kl
        found = {"of": self._of, "passes": list(self.known.items())}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, json.dumps(found) + "\n")
