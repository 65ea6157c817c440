"""The start-up self-test of the private hooks against vLLM's public API.

One idea: the same prompts, asked once with our mark and once without, in the same engine; a hook
that reads the wrong row, the wrong place or nothing at all cannot pass.
"""

from collections.abc import Callable

import numpy as np

from stillroom.cache_schemas.errors import TeacherError
from stillroom.pipeline.record import Example, content_id
from stillroom.pipeline.teacher.facts import ModelShape
from stillroom.pipeline.teacher.protocol import RejectedExample, check_finite
from stillroom.pipeline.teacher.vllm.requests import MarkedRequests, one_pass

NATS = {"float32": 2e-3, "bfloat16": 0.25, "float16": 0.05}
"""Most that one logprob may differ: both answers come from the same weights, in blocks of different
shapes; a wrong row differs by whole nats."""
LENGTHS = (2, 23)
PUBLIC_TOP = 8


def self_test(
    ask: Callable, requests: MarkedRequests, shape: ModelShape, dtype: str, context: int
) -> None:
    """Compare the two ways of asking.

    Args:
        ask: (example, sampling parameters) -> vLLM's finished output.
        requests: our way.
        shape, dtype: of the model.
        context: tokens of a prompt, at most.

    Raises:
        TeacherError: they differ; names both values.
    """
    for length in sorted({min(length, context) for length in LENGTHS}):
        example = _example(length, shape.vocab_size)
        ours = requests.signals(example, ask(example, requests.sampling(example)))
        _check_finite(example, ours)
        theirs = ask(example, one_pass(prompt_logprobs=min(PUBLIC_TOP, shape.vocab_size - 1)))
        for row in range(example.num_rows):
            public = theirs.prompt_logprobs[example.first_row + row + 1]  # entry t + 1 is row t
            _compare(ours, row, public, int(example.token_ids[example.first_row + row + 1]), dtype)


def _example(length: int, vocab_size: int) -> Example:
    """Fixed ids, with a loss mask that starts late where there is room for it."""
    ids = np.random.default_rng(length).integers(0, min(vocab_size, 256), length, dtype=np.int32)
    mask = np.arange(length) >= length // 2
    return Example(content_id(ids, mask), "self-test", "self-test", ids, mask)


def _check_finite(example: Example, signals: dict) -> None:
    try:
        check_finite(example, example.first_row, signals)
    except RejectedExample as error:
        raise TeacherError(error.found, where="vLLM self-test", remedy=error.remedy) from None


def _compare(ours: dict, row: int, public: dict, token: int, dtype: str) -> None:
    top = dict(zip(ours["topk_ids"][row].tolist(), ours["topk_logprobs"][row].tolist()))
    pairs = [("token_logprob", float(ours["token_logprob"][row]), public[token].logprob)]
    pairs += [(f"id {i}", top[i], public[i].logprob) for i in public if i in top]
    best = min(public, key=lambda i: public[i].rank)
    if top and best not in top:
        raise _differ(row, f"top ids {list(top)[:4]}", f"top id {best}")
    for name, mine, theirs in pairs:
        if not abs(mine - theirs) <= NATS.get(dtype, 0.25):
            raise _differ(row, f"{name} {mine:.5f}", f"{theirs:.5f}")


def _differ(row: int, ours: str, theirs: str) -> TeacherError:
    return TeacherError(
        f"the scoring hooks and vLLM's public API differ at row {row}: hooks say {ours}",
        expected=f"{theirs} (public API)",
        where="vLLM self-test",
        remedy="Nothing was captured. Report this with your vLLM, model and accelerator.",
    )
