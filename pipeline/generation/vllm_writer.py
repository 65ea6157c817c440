"""Writing under vLLM: one model, its scheduler full, one seeded request per answer.

One idea: vLLM reports the log probability of each drawn token after temperature and nucleus
(`processed_logprobs`), which is log b. Public API only.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from stillroom.pipeline.config import Teacher
from stillroom.pipeline.generation.writers import Answer, Writers, answer_key
from stillroom.pipeline.record import Example
from stillroom.pipeline.teacher.facts import model_directory, model_shape
from stillroom.pipeline.teacher.vllm.engine import start_vllm, vllm_arguments
from stillroom.pipeline.teacher.vllm.failures import step, with_needed
from stillroom.pipeline.teacher.vllm.images import check_served, with_pictures

IN_FLIGHT_REQUESTS = 512


class VllmGenerator:
    """See `generate.Generator`."""

    def __init__(self, writers: Writers, model: Teacher):
        self._writers = writers
        needed = {"logprobs_mode": "processed_logprobs"}
        self._llm: Any = start_vllm(model, writing_arguments(model, writers, needed))
        self._finished: dict[str, Any] = {}
        self._num_asked = 0

    def close(self) -> None:
        """End vLLM and its workers."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None

    def answer(self, prompts: Iterable[Example]) -> Iterator[list[Answer]]:
        """See `Generator.answer`."""
        source, asked = iter(prompts), deque()
        ahead = max(1, IN_FLIGHT_REQUESTS // self._writers.settings.n)
        while True:
            while len(asked) < ahead and (prompt := next(source, None)) is not None:
                asked.append(self._ask(prompt))
            if not asked:
                return
            yield [self._wait_for(request_id) for request_id in asked.popleft()]

    def _ask(self, prompt: Example) -> list[str]:
        """Hand all of a prompt's answers to vLLM; returns the requests' ids."""
        settings = self._writers.settings
        return [
            self._add(prompt, answer_key(settings.seed, prompt, number))
            for number in range(settings.n)
        ]

    def _add(self, prompt: Example, key: int) -> str:
        self._num_asked += 1
        request_id = f"{self._num_asked}-{prompt.example_id}"
        given: Any = {"prompt_token_ids": prompt.token_ids.tolist()}
        if prompt.images:
            given = with_pictures(prompt, self._writers.pictures, self._llm)
        self._llm.llm_engine.add_request(request_id, given, self._sampling(key))
        return request_id

    def _sampling(self, key: int):
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        settings = self._writers.settings
        return SamplingParams(
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=key,
            logprobs=0,
            stop_token_ids=list(self._writers.stop_ids),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _wait_for(self, request_id: str) -> Answer:
        while request_id not in self._finished:
            for output in step(self._llm):
                if output.finished:
                    self._finished[output.request_id] = output
        (found,) = self._finished.pop(request_id).outputs
        ids = np.asarray(found.token_ids, dtype=np.int32)
        pairs = zip(found.token_ids, found.logprobs)
        logprobs = np.array([entry[token].logprob for token, entry in pairs], dtype=np.float32)
        if self._writers.settings.temperature == 0:
            logprobs = np.zeros_like(logprobs)
        return Answer(ids, logprobs, bool(np.isin(ids[-1], self._writers.stop_ids)))


def writing_arguments(model: Teacher, writers: Writers, needed: dict[str, Any]) -> dict[str, Any]:
    """Arguments of an engine that writes.

    Args:
        model, writers: who writes, and how.
        needed: those that the caller cannot do without.

    Raises:
        ConfigError: a person's own say otherwise.
    """
    arguments = vllm_arguments(model, model_shape(model).context, writers.max_tokens, 1.0)
    if not torch.cuda.is_available():
        # A seeded request whose prompt is read in pieces needs what CPU generators do not have.
        arguments.setdefault("enable_chunked_prefill", False)
    if writers.pictures is not None:
        check_served(model_directory(model))
        needed = needed | {"skip_tokenizer_init": False}
    return with_needed(model, arguments, needed)
