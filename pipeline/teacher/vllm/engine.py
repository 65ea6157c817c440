"""The teacher under vLLM: every signal from tensors, no Python object per token and rank.

One idea: keep vLLM's scheduler full and hand on its answers in order; how a prompt is asked and an
answer read is `vllm.requests`. Before the first example the engine asks two prompts both by its own
hooks and by vLLM's public API, and refuses to work where they differ.

The alignment shift happens where row t meets token t+1, in `vllm.scoring`. Prefix caching is off: a
position served from it has no logits.
"""

import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from stillroom.pipeline.config import Capture, Teacher
from stillroom.pipeline.record import Example, TeacherRecord
from stillroom.pipeline.teacher import protocol
from stillroom.pipeline.teacher.facts import dtype_of, model_directory, model_shape
from stillroom.pipeline.teacher.images import Pictures
from stillroom.pipeline.teacher.vllm.adapter import adapter_arguments
from stillroom.pipeline.teacher.vllm.failures import add, step, with_needed
from stillroom.pipeline.teacher.vllm.images import check_served, with_pictures
from stillroom.pipeline.teacher.vllm.requests import MarkedRequests, PublicRequests
from stillroom.pipeline.teacher.vllm.self_test import self_test
from stillroom.pipeline.teacher.vllm.starting import import_vllm, start_vllm

VLLM_VERSION = "0.32.0"
USUAL_STEP_TOKENS = 8192
NO_GRAPHS = {"cudagraph_mode": "NONE"}
"""Nothing is ever decoded, and steps are longer than those that vLLM records as CUDA graphs, which
would cost start-up time and memory; compiled code is kept."""
LOADING = {"worker_extension_cls": "stillroom.pipeline.teacher.vllm.loading.WorkerExtension"}
"""What every engine is started with, so that weights which nothing was loaded into are found."""


@dataclass(slots=True)
class _Asked:
    """An example that was handed to vLLM, or refused at the door."""

    example: Example
    request_id: str = ""
    error: protocol.RejectedExample | None = None


class VllmEngine:
    """A teacher under vLLM, in this process (its workers may be others)."""

    def __init__(
        self,
        teacher: Teacher,
        capture: Capture,
        max_tokens: int = 0,
        batch_scale: float = 1.0,
        pictures: Pictures | None = None,
    ):
        self.shape = model_shape(teacher)
        self._capture, self._pictures = capture, pictures
        self._requests = requests_for(capture, teacher)
        arguments = vllm_arguments(teacher, self.shape.context, max_tokens, batch_scale)
        arguments = {"compilation_config": NO_GRAPHS} | arguments
        needed: dict[str, Any] = LOADING | {"enable_prefix_caching": False}
        if pictures is not None:
            check_served(teacher)
            needed["skip_tokenizer_init"] = False
        needed |= self._requests.engine_arguments()
        self._llm: Any = start_vllm(teacher, with_needed(teacher, arguments, needed))
        self._context = self._llm.model_config.max_model_len - 1  # one place is the sampled token's
        self._num_asked = 0
        self._finished: dict[str, object] = {}
        if isinstance(self._requests, MarkedRequests):
            self._test(self._requests)

    def _test(self, requests: MarkedRequests) -> None:
        """Compare the hooks with vLLM's public API; end vLLM where they differ or it fails."""
        dtype = str(self._llm.model_config.dtype).removeprefix("torch.")
        try:
            self_test(self._ask_alone, requests, self.shape, dtype, self._context)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End vLLM and its workers."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None

    def score(
        self, examples: Iterable[Example], reject: protocol.Reject = protocol.stop
    ) -> Iterator[TeacherRecord]:
        """See `TeacherEngine.score`."""
        source, asked = iter(examples), deque()
        try:
            while self._top_up(asked, source):
                output = self._wait_for(asked[0])
                yield self._record(asked.popleft(), output, reject)
        finally:
            self._forget(asked)

    def _top_up(self, asked: deque[_Asked], source: Iterator[Example]) -> bool:
        """Keep the scheduler's queue long; False when everything was asked and answered."""
        ahead = sum(len(item.example.token_ids) for item in asked)  # tokens
        while ahead < self._requests.in_flight_tokens:
            if (example := next(source, None)) is None:
                break
            asked.append(self._admit(example))
            ahead += len(example.token_ids)
        return bool(asked)

    def _admit(self, example: Example) -> _Asked:
        try:
            protocol.check_example(example, self.shape, self._context)
            prompt = self._prompt(example)
        except protocol.RejectedExample as error:
            return _Asked(example, error=error)
        return _Asked(example, self._add(example, prompt, self._requests.sampling(example)))

    def _prompt(self, example: Example) -> Any:
        if not example.images:
            return {"prompt_token_ids": example.token_ids.tolist()}
        return with_pictures(example, self._pictures, self._llm)

    def _add(self, example: Example, prompt: Any, sampling) -> str:
        """Hand a prompt to vLLM; returns the request's id."""
        self._num_asked += 1
        request_id = f"{self._num_asked}-{example.example_id}"
        add(self._llm, request_id, prompt, sampling)
        return request_id

    def _wait_for(self, item: _Asked):
        """vLLM's output for one request; those that finish before it are kept."""
        while item.request_id and item.request_id not in self._finished:
            for output in step(self._llm):
                if output.finished:
                    self._finished[output.request_id] = output
        return self._finished.pop(item.request_id, None)

    def _record(self, item: _Asked, output, reject: protocol.Reject) -> TeacherRecord:
        example = item.example
        try:
            if item.error is not None:
                raise item.error
            signals = self._requests.signals(example, output)
            first = protocol.first_row(example, self._capture)
            return protocol.record_of(example, self._capture, first, signals)
        except protocol.RejectedExample as error:
            reject(error)
            return protocol.empty_record(example, self._capture, self.shape)

    def _forget(self, asked: Iterable[_Asked]) -> None:
        """Drop requests whose answers nobody will read."""
        if self._llm is not None:
            self._llm.llm_engine.abort_request([item.request_id for item in asked])
            self._finished.clear()

    def _ask_alone(self, example: Example, sampling):
        return self._wait_for(_Asked(example, self._add(example, self._prompt(example), sampling)))


def requests_for(capture: Capture, teacher: Teacher) -> MarkedRequests | PublicRequests:
    """Our hooks on the release they were written for; the public API, with a warning, elsewhere."""
    found = import_vllm().__version__
    if found.split("+")[0] == VLLM_VERSION:
        return MarkedRequests(capture, teacher.scratch_mib << 20)
    warnings.warn(
        f"vLLM {found} is not {VLLM_VERSION}, the release that the scoring hooks were written for: "
        "using its public API, which is one to two orders of magnitude slower and has no hidden "
        f"states. Install vllm=={VLLM_VERSION} for the fast path.",
        stacklevel=2,
    )
    return PublicRequests(capture)


def vllm_arguments(teacher: Teacher, context: int, max_tokens: int, batch_scale: float) -> dict:
    """vLLM's engine arguments; those of [teacher.engine_args] win."""
    arguments = {
        "model": str(model_directory(teacher)),
        "dtype": dtype_of(teacher),  # "auto" is another dtype to vLLM than to transformers
        "quantization": teacher.quantization or None,
        "trust_remote_code": teacher.trust_remote_code,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        **adapter_arguments(teacher),
    }
    if longest := min(max_tokens or context, context or max_tokens):
        arguments["max_model_len"] = longest + 1  # the token that is sampled and thrown away
    if not torch.cuda.is_available():
        arguments["enforce_eager"] = True
    arguments |= teacher.engine_args
    if batch_scale != 1.0:
        usual = arguments.get("max_num_batched_tokens", USUAL_STEP_TOKENS)
        arguments["max_num_batched_tokens"] = max(1, int(usual * batch_scale))
        seqs = arguments.get("max_num_seqs", 128)
        # vLLM refuses more sequences than tokens in a step.
        arguments["max_num_seqs"] = min(seqs, arguments["max_num_batched_tokens"])
    return arguments
