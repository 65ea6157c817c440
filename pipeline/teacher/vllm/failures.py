"""vLLM's failures, at its start or in any step, as messages; and arguments that we need ourselves.

One idea: whatever vLLM raises is told in its own most telling line, with what a person can do. A
person's engine arguments win over ours; one that would break the work is refused with the reason.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from stillroom.cache_schemas.errors import ConfigError, StillroomError, TeacherError, first_line
from stillroom.pipeline.config import Teacher
from stillroom.pipeline.teacher import protocol
from stillroom.pipeline.teacher.quantised import cannot_run, method_of

NEEDED = {
    "enable_prefix_caching": "a position served from the prefix cache has no logits",
    "worker_extension_cls": "it brings scoring and the measure of what was loaded into the workers",
    "logprobs_mode": "it says which log-probabilities come back",
    "max_logprobs": "every logit of the vocabulary is asked for",
    "skip_tokenizer_init": "vLLM's image processors ask for the tokenizer",
}
"""Engine argument of ours -> why no other value will do."""


def step(llm: Any) -> list:
    """One step of vLLM's scheduler: outputs.

    Raises:
        OutOfMemory: it did not fit.
        TeacherError: vLLM failed.
    """
    with told(llm):
        return llm.llm_engine.step()


def add(llm: Any, request_id: str, prompt: Any, sampling: Any) -> None:
    """Hand a prompt to vLLM's scheduler; raises as `step` does."""
    with told(llm):
        llm.llm_engine.add_request(request_id, prompt, sampling)


@contextmanager
def told(llm: Any) -> Iterator[None]:
    """Whatever a running vLLM raises here, as one of our errors."""
    try:
        yield
    except StillroomError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise out_of_memory(error) from error
        raise _failed(str(llm.model_config.model), telling(error)) from error


def _failed(model: str, reason: str) -> StillroomError:
    if method := method_of(model):
        return cannot_run(model, method, "vLLM", reason, TeacherError)
    return TeacherError(
        f"vLLM failed while it ran this model ({reason})",
        where=model,
        remedy="Another `dtype` or [teacher.engine_args] may do; `--engine reference` runs "
        "whatever transformers can.",
    )


def telling(error: BaseException) -> str:
    """The line of an exception that says most: pydantic puts it second; a bare `assert` says it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and "validation error" in lines[0]:
        return lines[1].removeprefix("Value error, ").split(" [type=")[0]
    said = lines[0][:300] if lines else _failing_line(error)
    plain = isinstance(error, RuntimeError | ValueError | NotImplementedError)
    return said if said and plain else f"{type(error).__name__}: {said}".rstrip(": ")


def _failing_line(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return (frames[-1].line or "") if frames else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine had no room."""
    text = str(error).lower()
    marks = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(m in text for m in marks)


def out_of_memory(error: BaseException) -> protocol.OutOfMemory:
    """The same as one of our errors."""
    return protocol.OutOfMemory(
        f"vLLM ran out of memory ({first_line(error)})",
        remedy=(
            "Set max_num_batched_tokens, gpu_memory_utilization or tensor_parallel_size under "
            "[teacher.engine_args] (on a CPU: VLLM_CPU_KVCACHE_SPACE, in GiB)."
        ),
    )


def with_needed(teacher: Teacher, arguments: dict, needed: dict) -> dict:
    """Arguments with those that the work needs; `additional_config` is added to a person's own.

    Raises:
        ConfigError: a person's own argument says otherwise.
    """
    for name, value in needed.items():
        theirs = teacher.engine_args.get(name, value)
        if name != "additional_config" and theirs != value:
            raise ConfigError(
                f"{name} = {theirs!r}",
                expected=f"{value!r}: {NEEDED[name]}",
                where=f"[teacher.engine_args] {name}",
                remedy="Leave it out.",
            )
    more = arguments.get("additional_config", {}) | needed.get("additional_config", {})
    return arguments | needed | ({"additional_config": more} if more else {})
