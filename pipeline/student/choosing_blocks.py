"""`[student] leave_out`: a run's own measurement of which blocks its student goes without.

One idea: what was measured is kept where it is used, in the receipt of the initial student, so a
run that goes on, or has lost its corpus, measures nothing again. How it is measured is
`leaving_out`'s.
"""

import json
from pathlib import Path

import torch

from stillroom.pipeline.config import Teacher
from stillroom.pipeline.config.training import Student
from stillroom.pipeline.corpus.preparing import Corpus
from stillroom.pipeline.shares import evenly
from stillroom.pipeline.student.leaving_out import LeftOut, Progress, least_missed
from stillroom.pipeline.student.model import load_source
from stillroom.pipeline.student.saving import RECEIPT
from stillroom.pipeline.student.states import blocks_of


def with_blocks_chosen(
    student: Student,
    teacher: Teacher | None,
    corpus: Path,
    initial: Path,
    on_progress: Progress | None = None,
) -> Student:
    """The table with `keep_layers` for its `leave_out`; any other as it is.

    Args:
        corpus: directory of the prepared corpus, on whose text it is measured.
        initial: of the initial student; where that is made already, its own blocks are taken.
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
        kept, _ = measured_blocks(student, teacher, corpus, on_progress)
    return student.model_copy(update={"keep_layers": tuple(kept)})


def measured_blocks(
    student: Student, teacher: Teacher, corpus: Path, on_progress: Progress | None = None
) -> tuple[list[int], list[LeftOut]]:
    """Blocks to keep, ascending, and those that go in the order in which they were chosen.

    Args:
        student: its `leave_out`, and `leave_out_tokens` of training text: whole examples, evenly
            spread, one at least.
        corpus: directory of the prepared corpus.
        on_progress: as of `least_missed`.
    """
    texts = Corpus.open(corpus).split("train")
    wanted = max(1, student.leave_out_tokens // max(len(texts[0].token_ids), 1))  # examples
    examples = [texts[number] for number in evenly(len(texts), wanted)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_source(student, teacher).eval().to(device)
    gone = least_missed(model, examples, student.leave_out, on_progress)
    without = {left.block for left in gone}
    return [n for n in range(len(blocks_of(model))) if n not in without], gone
