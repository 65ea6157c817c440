"""The two splits of a corpus: which documents are held out, and what names the result.

One idea: examples arrive in one file in their final order and are dealt to the splits by document,
so no document is in both; the digest covers every example in order and whatever else gives the
examples their meaning. How examples are made is not decided here.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.corpus.files import SPLITS, ExampleFile, read_examples
from stillroom.pipeline.record import Example


def heldout_documents(documents: Iterable[str], share: float, seed: int) -> set[str]:
    """The documents to hold out: those with the lowest hash, the same ones for the same seed.

    At least one and never all, so both splits have something in them.

    Raises:
        CorpusError: there is one document only, and something should be held out.
    """
    ordered = sorted(set(documents), key=lambda d: hashlib.sha256(f"{seed}:{d}".encode()).digest())
    if share == 0:
        return set()
    if len(ordered) < 2:
        raise CorpusError(
            "the corpus is one document, and a document is never split between train and held-out",
            where="[prepare] heldout",
            remedy="Add documents, cut the file into several, or set heldout = 0.",
        )
    return set(ordered[: min(max(1, round(share * len(ordered))), len(ordered) - 1)])


def deal(
    drawn: Path,
    documents: Collection[str],
    share: float,
    seed: int,
    meaning: Any,
    again: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Deal the examples of a file to the splits beside it, and remove the file.

    Args:
        drawn: Arrow file of all examples.
        documents: ids of their documents.
        share, seed: see `heldout_documents`.
        meaning: JSON of what the digest covers beside the examples.
        again: example id -> how many more times it was there; added to its weight.

    Returns:
        `digest`, and `counts` per split.
    """
    held = heldout_documents(documents, share, seed)
    counts = {name: Counter(documents=0, examples=0, tokens=0, targets=0) for name in SPLITS}
    counts["heldout"]["documents"] = len(held)
    counts["train"]["documents"] = len(documents) - len(held)
    digest = hashlib.sha256()
    with ExitStack() as stack:
        files = {n: stack.enter_context(ExampleFile(drawn.with_name(f"{n}.arrow"))) for n in SPLITS}
        for example in read_examples(drawn):
            if again and example.example_id in again:
                example = replace(example, weight=example.weight + again[example.example_id])
            name = "heldout" if example.document_id in held else "train"
            files[name].write(example)
            digest.update(_line(name, example))
            size = {"examples": 1, "tokens": len(example.token_ids)}
            # No row predicts the first token.
            counts[name].update(size, targets=int(example.loss_mask[1:].sum()))
    drawn.unlink()
    digest.update(canonical_json(meaning))
    counted = {name: dict(count) for name, count in counts.items()}
    return {"digest": digest.hexdigest(), "counts": counted}


def canonical_json(value: Any) -> bytes:
    """JSON with one spelling for one value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _line(split: str, example: Example) -> bytes:
    facts = (split, example.example_id, example.document_id, example.source, example.weight)
    read = example.teacher_prompt
    more = () if read is None else (hashlib.sha256(read.astype("<i4").tobytes()).hexdigest(),)
    return canonical_json([*facts, *more]) + b"\n"
