"""The vLLM engine that also writes: the most probable continuation of a prompt.

One idea: the requests carry no mark, so vLLM answers them itself beside those that are scored; one
engine, one set of weights.
"""

from collections.abc import Sequence

import numpy as np

from stillroom.pipeline.teacher.vllm.engine import VllmEngine
from stillroom.pipeline.teacher.vllm.failures import add, step


class GreedyVllm(VllmEngine):
    """See `stillroom.pipeline.teacher.opening.WritingEngine`."""

    def write(
        self, prompts: Sequence[np.ndarray], max_tokens: int, stop_ids: Sequence[int]
    ) -> list[np.ndarray]:
        """See `WritingEngine.write`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0,
            stop_token_ids=list(stop_ids),
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        asked = [self._ask_to_write(prompt, sampling) for prompt in prompts]
        found = {}
        while len(found) < len(asked):
            for output in step(self._llm):
                found[output.request_id] = output.outputs[0].token_ids
        return [np.asarray(found[request], dtype=np.int32) for request in asked]

    def _ask_to_write(self, prompt: np.ndarray, sampling) -> str:
        self._num_asked += 1
        request_id = f"{self._num_asked}-written"
        given = {"prompt_token_ids": prompt.tolist()}
        add(self._llm, request_id, given, sampling)
        return request_id
