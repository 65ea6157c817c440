"""Writing under vLLM: one model, its scheduler full, one seeded request per answer.

One idea: vLLM reports the log probability of each drawn token after temperature and nucleus
(`processed_logprobs`), which is log b. Public API only.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from stillroom.pipeline.config import Teacher
from stillroom.pipeline.generation.vllm_serving import ServedWriter
from stillroom.pipeline.generation.writers import Answer, Writers, answer_key
from stillroom.pipeline.record import Example

IN_FLIGHT_REQUESTS = 512


class VllmGenerator:
    """See `writers.Generator`."""

    def __init__(self, writers: Writers, model: Teacher):
        self._writers = writers
        self._served = ServedWriter(model, writers, {"logprobs_mode": "processed_logprobs"})
        self._finished: dict[str, Any] = {}

    def served(self) -> list[ServedWriter]:
        """See `Generator.served`."""
        return [self._served]

    def close(self) -> None:
        """End vLLM and its workers."""
        self._served.close()

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
        keys = [answer_key(settings.seed, prompt, number) for number in range(settings.n)]
        how = {"top_p": settings.top_p, "logprobs": 0}  # the drawn token's own, no other
        return [
            self._served.ask(prompt, self._served.sampling(settings.max_tokens, key, **how))
            for key in keys
        ]

    def _wait_for(self, request_id: str) -> Answer:
        while request_id not in self._finished:
            self._finished |= {output.request_id: output for output in self._served.step()}
        (found,) = self._finished.pop(request_id).outputs
        ids = np.asarray(found.token_ids, dtype=np.int32)
        pairs = zip(found.token_ids, found.logprobs)
        logprobs = np.array([entry[token].logprob for token, entry in pairs], dtype=np.float32)
        if self._writers.settings.temperature == 0:
            logprobs = np.zeros_like(logprobs)  # all of b is on its mode
        return Answer(ids, logprobs, bool(np.isin(ids[-1], self._writers.stop_ids)))
