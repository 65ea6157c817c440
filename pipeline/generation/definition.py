"""Whoever writes under vLLM, held against the definition of its model before an answer is kept.

One idea: a writer says what it thinks of a few prompts by vLLM's public log-probabilities, and the
check of a capture judges them; a model that vLLM computes otherwise writes other text than it
should, and no later capture can see that. It draws nothing.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.pipeline.config import Capture
from stillroom.pipeline.generation.writers import Generator, Served
from stillroom.pipeline.record import Example, TeacherRecord
from stillroom.pipeline.teacher.definition_check import Question, check_definition
from stillroom.pipeline.teacher.images import Pictures
from stillroom.pipeline.teacher.protocol import Reject, stop
from stillroom.pipeline.whole_text import write_whole

TOP = 8
"""Ids that are compared beside the text's own; vLLM lists 20 at most unless told otherwise."""


def check_writers(
    generator: Generator,
    prompts: Sequence[Example],
    pictures: Pictures | None,
    check: str,
    noted: Path,
) -> None:
    """Compare every model that writes under vLLM with its definition, once, and note the results.

    Args:
        generator: running; it is closed where a model differs.
        prompts, pictures: what it will be asked about.
        check: see `[capture] check`.
        noted: file for the results, a list of `DefinitionCheck`s.

    Raises:
        TeacherError: a model differs, or cannot be compared and `check` is "always".
    """
    if noted.is_file() or not generator.served():
        return
    table = Capture.model_validate({"k": TOP, "entropy": False, "check": check})
    texts = Whole(prompts)
    tokens = sum(len(prompt.token_ids) for prompt in prompts)
    found = []
    try:
        for served in generator.served():
            engine: Any = PublicEngine(served)
            asked = Question(served.model, table, texts, pictures, tokens)
            found.append(check_definition(engine, asked).model_dump(mode="json"))
    except BaseException:
        generator.close()
        raise
    write_whole(noted, json.dumps(found))


class PublicEngine:
    """A running engine of vLLM that is asked by its public API: log-probabilities, no states."""

    def __init__(self, served: Served):
        self._served = served

    def score(self, examples: Iterable[Example], reject: Reject = stop) -> Iterator[TeacherRecord]:
        """See `teacher.protocol.Engine.score`; the texts are known to fit."""
        from stillroom.pipeline.teacher.vllm.requests import one_pass

        for example in examples:
            output = self._served.answer_alone(example, one_pass(prompt_logprobs=TOP))
            # Entry t + 1 is row t.
            said = output.prompt_logprobs[example.first_row + 1 :]
            yield TeacherRecord(example, example.first_row, _signals(example, said))


def _signals(example: Example, said: Sequence[dict[int, Any]]) -> dict[str, np.ndarray]:
    targets = example.token_ids[example.first_row + 1 :].tolist()
    best = [sorted(row, key=lambda token: row[token].rank)[:TOP] for row in said]
    listed = [[row[token].logprob for token in tokens] for row, tokens in zip(said, best)]
    return {
        "token_logprob": np.array([row[token].logprob for row, token in zip(said, targets)]),
        "topk_ids": np.array(best, dtype=np.int32),
        "topk_logprobs": np.array(listed),
    }


class Whole(Sequence[Example]):
    """Prompts as texts of which every token counts."""

    def __init__(self, prompts: Sequence[Example]):
        self._prompts = prompts

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Whole(self._prompts[index])
        prompt = self._prompts[index]
        return replace(prompt, loss_mask=np.ones(len(prompt.token_ids), dtype=bool))
