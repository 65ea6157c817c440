"""vLLM against the reference engine on one image-text teacher: how far apart they are.

One idea: both score the same examples with everything kept, image positions too, and the largest
differences are what is reported. It judges nothing; what is allowed is said where it is used.
"""

from itertools import islice
from typing import Any

import numpy as np

from pipeline.capture_plan import pictures_of
from pipeline.config import Capture, Teacher
from pipeline.corpus import Corpus
from pipeline.teacher.engine import RejectedExample, open_engine

ENGINES = ("vllm", "reference")
HIDDEN = ("hidden.1", "hidden.final")


def compare(teacher: Teacher, corpus: Corpus, count: int, k: int = 16) -> dict[str, Any]:
    """Score the first examples of a corpus with both engines.

    Args:
        teacher: dtype float32, or differences are those of its arithmetic.
        corpus: prepared, with images.
        count: examples, at most.
        k: log-probabilities compared per row.

    Returns:
        `examples`; `rejected` ids (vLLM refuses an example whose images stand elsewhere than the
        corpus says); `logprob` and `lse`, the largest absolute differences in nats; `hidden`, the
        largest |a - b| / |b| of an example's states; `same_rows`, share of examples with the same
        rows and positions; `same_answers`, share of predictions of answers with the same best id.
    """
    examples = list(islice(corpus.split("train"), count))
    table = Capture(k=k, hidden_layers=(1, "final"), score_images=True)
    rejected: list[RejectedExample] = []
    said = []
    for name in ENGINES:
        longest = max(len(example.token_ids) for example in examples)
        engine = open_engine(name, teacher, table, max_tokens=longest, pictures=pictures_of(corpus))
        try:
            said.append(list(engine.score(examples, rejected.append)))
        finally:
            engine.close()
    pairs = list(zip(*said, strict=True))
    return {
        "examples": len(examples),
        "rejected": [error.example.example_id for error in rejected],
        "logprob": max(_apart(pair, "topk_logprobs") for pair in pairs),
        "lse": max(_apart(pair, "lse") for pair in pairs),
        "hidden": max(
            _relative(pair, name) for pair in pairs for name in ("hidden.1", "hidden.final")
        ),
        "same_rows": float(np.mean([_same_rows(pair) for pair in pairs])),
        "same_answers": float(np.mean(np.concatenate([_same_answers(pair) for pair in pairs]))),
    }


def _apart(pair: tuple, name: str) -> float:
    ours, truth = (record.signals[name] for record in pair)
    return float(np.abs(ours - truth).max())


def _relative(pair: tuple, name: str) -> float:
    ours, truth = (record.signals[name] for record in pair)
    return float(np.linalg.norm(ours - truth) / np.linalg.norm(truth))


def _same_rows(pair: tuple) -> bool:
    ours, truth = pair
    return ours.first_row == truth.first_row and np.array_equal(
        ours.hidden_positions, truth.hidden_positions
    )


def _same_answers(pair: tuple) -> np.ndarray:
    best = [record.signals["topk_ids"][:, 0] for record in pair]
    answers = pair[0].example.loss_mask[1:][pair[0].first_row :]
    return (best[0] == best[1])[answers]
