"""One engine of vLLM that writes: what it is started with, how it is asked, which answers are done.

One idea: whoever writes under vLLM hands a text and how to go on to a running engine and is told
by a request's id when it has; scheduling is vLLM's. Public API only.
"""

from typing import Any

import torch

from stillroom.pipeline.config import Teacher
from stillroom.pipeline.generation.writers import Writers
from stillroom.pipeline.record import Example
from stillroom.pipeline.teacher.facts import model_shape
from stillroom.pipeline.teacher.vllm.engine import LOADING, vllm_arguments
from stillroom.pipeline.teacher.vllm.failures import add, step, with_needed
from stillroom.pipeline.teacher.vllm.images import check_served, with_pictures
from stillroom.pipeline.teacher.vllm.starting import start_vllm


class ServedWriter:
    """A model under vLLM.

    Args:
        model: which.
        writers: longest text, pictures, the tokens that end an answer.
        needed: engine arguments that its caller cannot do without.

    Raises:
        ConfigError: a person's own say otherwise.
    """

    def __init__(self, model: Teacher, writers: Writers, needed: dict[str, Any]):
        self.model, self._writers = model, writers
        self._llm: Any = start_vllm(model, _arguments(model, writers, needed))
        self._num_asked = 0

    def ask(self, text: Example, sampling: Any) -> str:
        """Hand a text to vLLM; returns the request's id."""
        self._num_asked += 1
        request_id = f"{self._num_asked}-{text.example_id}"
        given: Any = {"prompt_token_ids": text.token_ids.tolist()}
        if text.images:
            given = with_pictures(text, self._writers.pictures, self._llm)
        add(self._llm, request_id, given, sampling)
        return request_id

    def step(self) -> list[Any]:
        """One scheduler step; the outputs that it finished."""
        return [output for output in step(self._llm) if output.finished]

    def answer_alone(self, text: Example, sampling: Any) -> Any:
        """vLLM's output for one text while nothing else is asked."""
        self.ask(text, sampling)
        while not (finished := self.step()):
            pass
        return finished[0]

    def sampling(self, max_tokens: int, seed: int, **more: Any) -> Any:
        """`SamplingParams` of at most `max_tokens` tokens at the writers' temperature."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self._writers.settings.temperature,
            seed=seed,
            stop_token_ids=list(self._writers.stop_ids),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **more,
        )

    def close(self) -> None:
        """End vLLM and its workers."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None


def _keeps_states(arguments: dict[str, Any]) -> bool:
    """Whether vLLM's model remembers in another way than by keys and values alone."""
    from vllm.engine.arg_utils import EngineArgs

    try:
        made = EngineArgs(**arguments).create_model_config()
    except Exception:  # whatever vLLM will say again, and be told of, when it starts
        return False
    return made.is_hybrid or made.is_attention_free


def _arguments(model: Teacher, writers: Writers, needed: dict[str, Any]) -> dict[str, Any]:
    """Arguments of an engine that writes."""
    arguments = vllm_arguments(model, model_shape(model).context, writers.max_tokens, 1.0)
    if not torch.cuda.is_available():
        # A seeded request whose prompt is read in pieces needs what CPU generators do not have.
        arguments.setdefault("enable_chunked_prefill", False)
        if not arguments["enable_chunked_prefill"] and _keeps_states(arguments):
            arguments.setdefault("enable_prefix_caching", False)  # of states: by pieces only
    needed = LOADING | needed
    if writers.pictures is not None:
        check_served(model)
        needed["skip_tokenizer_init"] = False
    return with_needed(model, arguments, needed)
