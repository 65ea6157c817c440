"""vLLM against the reference engine on one image-text teacher: how far apart they are.

One idea: both score the same examples with everything kept, image positions too, and the reference
scores them once more in float64, so that what is reported is the largest differences and beside
them what the arithmetic alone costs. It judges nothing; what is allowed is said where it is used.
"""

from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np

from stillroom.pipeline.capture.plan import pictures_of
from stillroom.pipeline.config import Capture, Teacher
from stillroom.pipeline.corpus.preparing import Corpus
from stillroom.pipeline.record import TeacherRecord
from stillroom.pipeline.teacher.opening import open_engine
from stillroom.pipeline.teacher.protocol import RejectedExample

JUDGED = {"vllm": "float32", "reference": "float32", "exact": "float64"}
HIDDEN = ("hidden.1", "hidden.final")


def compare(teacher: Teacher, corpus: Corpus, count: int, k: int = 16) -> dict[str, Any]:
    """Score the first examples of a corpus with both engines.

    Args:
        teacher: which model; its dtype is not looked at.
        corpus: prepared, with images.
        count: examples, at most.
        k: log-probabilities compared per row.

    Returns:
        `examples`; `rejected` ids (vLLM refuses an example whose images stand elsewhere than the
        corpus says); `logprob` and `lse`, the largest absolute differences in nats; `answers`, the
        first of the rows that predict answers alone; `rounding` and `answers_rounding`, `logprob`
        and `answers` of the reference against itself in float64; `hidden`, the largest
        |a - b| / |b| of an example's states; `same_rows`, share of examples with the same rows and
        positions; `same_answers`, share of predictions of answers with the same best id.
    """
    examples = list(islice(corpus.split("train"), count))
    rejected: list[RejectedExample] = []
    said = {name: _records(name, teacher, corpus, examples, k, rejected.append) for name in JUDGED}
    pairs = list(zip(said["vllm"], said["reference"], strict=True))
    exact = list(zip(said["reference"], said["exact"], strict=True))
    return {
        "examples": len(examples),
        "rejected": [error.example.example_id for error in rejected],
        "logprob": _largest(pairs, "topk_logprobs"),
        "answers": _largest(pairs, "topk_logprobs", _answers),
        "rounding": _largest(exact, "topk_logprobs"),
        "answers_rounding": _largest(exact, "topk_logprobs", _answers),
        "lse": _largest(pairs, "lse"),
        "hidden": max(_relative(pair, name) for pair in pairs for name in HIDDEN),
        "same_rows": float(np.mean([_same_rows(pair) for pair in pairs])),
        "same_answers": float(np.mean(np.concatenate([_same_answers(pair) for pair in pairs]))),
    }


def _records(
    name: str, teacher: Teacher, corpus: Corpus, examples: list, k: int, on_reject: Callable
) -> list[TeacherRecord]:
    engine = open_engine(
        "vllm" if name == "vllm" else "reference",
        # Not validated: float64 is for judging, no teacher is run in it.
        teacher.model_copy(update={"dtype": JUDGED[name]}),
        Capture(k=k, hidden_layers=(1, "final"), score_images=True),
        max_tokens=max(len(example.token_ids) for example in examples),
        pictures=pictures_of(corpus),
    )
    try:
        return list(engine.score(examples, on_reject))
    finally:
        engine.close()


def _largest(pairs: list[tuple], name: str, of: Callable = lambda pair: ...) -> float:
    """Over the pairs, in the rows that `of` picks."""
    return max(float(_apart(pair, name)[of(pair)].max()) for pair in pairs)


def _apart(pair: tuple, name: str) -> np.ndarray:
    ours, truth = (record.signals[name] for record in pair)
    return np.abs(ours - truth)


def _relative(pair: tuple, name: str) -> float:
    ours, truth = (record.signals[name] for record in pair)
    return float(np.linalg.norm(ours - truth) / np.linalg.norm(truth))


def _same_rows(pair: tuple) -> bool:
    ours, truth = pair
    return ours.first_row == truth.first_row and np.array_equal(
        ours.hidden_positions, truth.hidden_positions
    )


def _answers(pair: tuple) -> np.ndarray:
    return pair[0].example.loss_mask[1:][pair[0].first_row :]


def _same_answers(pair: tuple) -> np.ndarray:
    best = [record.signals["topk_ids"][:, 0] for record in pair]
    return (best[0] == best[1])[_answers(pair)]
