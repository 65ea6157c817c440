"""How long the examples of somebody's data are, from the first documents of it.

One idea: the data are really prepared, with the teacher's own tokenizer and template, into a
directory that is thrown away; so what cannot be read is found here, and lengths are not guessed.
It takes no more documents than asked for.
"""

import json
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.config import Prepare, Source, Teacher
from stillroom.pipeline.corpus.preparing import prepare
from stillroom.pipeline.corpus.rejects import FILE
from stillroom.pipeline.teacher.facts import model_shape

DOCUMENTS = 2000
LONGEST = 32_768
"""Tokens of a window while looking, where the teacher's context allows them."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What the first documents say.

    Attributes:
        documents: how many were read.
        whole: there are no more of them.
        lengths: tokens of every example made, ascending.
        targets: tokens that are learned.
        seconds: reading and tokenising them took.
        said: what the data are taken for, and what was left out.
        rejected: rows that cannot be used, as `stillroom prepare` names them when it stops there.
    """

    documents: int
    whole: bool
    lengths: tuple[int, ...]
    targets: int
    seconds: float
    said: tuple[str, ...]
    rejected: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Of all examples."""
        return sum(self.lengths)

    def share(self, part: float) -> int:
        """The length that this part of the examples does not exceed."""
        return self.lengths[min(math.ceil(part * len(self.lengths)), len(self.lengths)) - 1]


def sample(data: str, teacher: Teacher, documents: int = DOCUMENTS) -> Sample:
    """Prepare the first documents of a file, a folder or a glob.

    Raises:
        CorpusError: it cannot be read, or nothing in it can be learned.
        TeacherError: there is no such teacher.
    """
    context = model_shape(teacher).context or LONGEST
    source = Source(name=Path(data).name or "data", path=data, limit=documents)
    # Held out nothing: every example counts. Rows that cannot be used are told, not stopped at.
    table = Prepare(source=(source,), window=min(context, LONGEST), heldout=0.0, on_error="skip")
    said: list[str] = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        where = Path(scratch, "corpus")
        corpus = prepare(table, teacher.model, where, revision=teacher.revision, say=said.append)
        counts = corpus.facts["counts"]["train"]
        lengths = sorted(len(example.token_ids) for example in corpus.split("train"))
        rejected = _rejected(where / FILE)
    if not lengths:
        raise CorpusError("holds nothing that can be learned", where=data)
    seconds = time.perf_counter() - started
    read = counts["documents"]
    facts = tuple(lengths), counts["targets"], seconds, tuple(said), rejected
    return Sample(read, read < documents, *facts)


def _rejected(path: Path) -> tuple[str, ...]:
    """Row and reason of each that was left out."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else ()
    return tuple(f"{told['row']}: {told['reason']}" for told in map(json.loads, lines))
