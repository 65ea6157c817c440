"""What runs beside vLLM's scheduler: lets the matrices of marked requests through untouched.

One idea: vLLM's output processor turns prompt logprobs into one Python object per token and rank;
for marked requests it keeps the tensors instead. Private names of one release, like `worker`.
"""

from typing import Any

from stillroom.pipeline.teacher.rows import MARK


class KeptTensors:
    """Stands in a `RequestOutput.prompt_logprobs`; `tensors` is (ints, floats, hidden states)."""

    tensors = None


def install() -> None:
    """Hook the driver's output processor; may be called more than once."""
    from vllm.v1.engine.logprobs import LogprobsProcessor

    if hasattr(LogprobsProcessor, "stillroom_hooked"):
        return
    make, update = (
        LogprobsProcessor.from_new_request.__func__,
        LogprobsProcessor._update_prompt_logprobs,
    )

    def from_new_request(cls, tokenizer, request):
        processor = make(cls, tokenizer, request)
        if MARK in (request.sampling_params.extra_args or {}):
            processor.prompt_logprobs = KeptTensors()
        return processor

    def update_prompt_logprobs(self, tensors):
        if isinstance(self.prompt_logprobs, KeptTensors):
            self.prompt_logprobs.tensors = tensors[:3]  # as `Progress.finish` has made them
        else:
            update(self, tensors)

    hooked: Any = LogprobsProcessor
    hooked.from_new_request = classmethod(from_new_request)
    hooked._update_prompt_logprobs = update_prompt_logprobs
    hooked.stillroom_hooked = True
