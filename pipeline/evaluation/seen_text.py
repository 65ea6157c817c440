"""Measured text that a student was trained on, as far as training corpora are at hand.

One idea: a student looks better on what it has read, and whoever measures need not know that: so
what is measured is looked for in the run's own training split, and in that of every run whose
student is named. A student without a corpus beside it says nothing, and nothing is said about it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from stillroom.pipeline.config import Evaluate, Run
from stillroom.pipeline.corpus.files import Corpus
from stillroom.pipeline.corpus.overlap import between
from stillroom.pipeline.record import Example
from stillroom.pipeline.shares import evenly

CORPUS = "corpus"
"""In a run's directory, beside its student."""
LOOKED_THROUGH = 50_000
"""Examples of a training split, evenly spread over it: about ten seconds of one core."""


def seen_in_training(
    run: Run, students: Mapping[str, str], corpus: Corpus, examples: Sequence[Example]
) -> dict[str, dict[str, int]]:
    """How much of the measured text is in the training splits that are known.

    Args:
        students: label -> directory.
        corpus: what the examples are of.

    Returns:
        Directory of a training corpus -> as `overlap.between`; `itself`: 1 where its training
        split is what was measured on; `looked_through`, `of`: its examples. Where these differ, at
        least so much is shared.
    """
    split = (run.evaluate or Evaluate()).split
    found = {}
    for place in _training_corpora(run, students):
        other = Corpus.open(place)
        if other.facts["tokenizer"]["sha256"] != corpus.facts["tokenizer"]["sha256"]:
            continue  # the same number is another token
        itself = split == "train" and other.digest == corpus.digest
        texts = other.split("train")
        chosen = evenly(len(texts), LOOKED_THROUGH)
        size = {"itself": int(itself), "looked_through": len(chosen), "of": len(texts)}
        found[str(place)] = between(examples, (texts[number] for number in chosen)) | size
    return found


def _training_corpora(run: Run, students: Mapping[str, str]) -> list[Path]:
    """Prepared corpora of the runs that trained the students."""
    own = [run.path(CORPUS)] if run.train is not None else []
    beside = [Path(student).parent / CORPUS for student in students.values()]
    there = [path.resolve() for path in (*own, *beside) if (path / "corpus.json").is_file()]
    return list(dict.fromkeys(there))
