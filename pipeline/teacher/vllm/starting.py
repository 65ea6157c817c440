"""Starting vLLM: the environment it reads, and its refusals as messages.

One idea: whoever needs an engine of vLLM, to score or to write, starts it here, so that the
checkpoint is looked at first, the adapter of [teacher] is in every request, and no failure is a
traceback. It chooses no engine arguments.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from stillroom.cache_schemas.errors import StillroomError, TeacherError
from stillroom.pipeline.config import Teacher
from stillroom.pipeline.teacher.facts import model_directory
from stillroom.pipeline.teacher.quantised import cannot_run, method_of
from stillroom.pipeline.teacher.reference.engine import read_names
from stillroom.pipeline.teacher.vllm import plugin
from stillroom.pipeline.teacher.vllm.adapter import check_adapted, speak_through_adapter
from stillroom.pipeline.teacher.vllm.failures import is_out_of_memory, out_of_memory, telling


def start_vllm(teacher: Teacher, arguments: dict):
    """Start vLLM.

    Raises:
        TeacherError: it cannot serve this model, or the checkpoint lacks weights.
    """
    check_adapted(read_names(teacher), teacher)
    _set_environment()
    plugin.register()
    try:
        with _processors_shared(_num_ranks(arguments)):
            llm = import_vllm().LLM(**{"use_tqdm_on_load": False} | arguments)
    except TeacherError:
        raise
    except Exception as error:
        if is_out_of_memory(error) or "kv cache" in str(error).lower():
            raise out_of_memory(error) from error
        raise _not_served(teacher, error) from error
    speak_through_adapter(llm, teacher)
    return llm


def _not_served(teacher: Teacher, error: Exception) -> StillroomError:
    reason = telling(error)
    method = teacher.quantization or method_of(model_directory(teacher))
    if method:
        return cannot_run(teacher.model, method, "vLLM", reason, TeacherError)
    return TeacherError(
        f"vLLM cannot serve this model ({reason})",
        where=teacher.model,
        remedy="`--engine reference` runs whatever transformers can load.",
    )


def _set_environment() -> None:
    """Settings that vLLM reads from the environment only; a person's own values win."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # tensors stay in this process
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    # The hooks have not been run on a GPU under the newer runner: use the one that was tested.
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")


def _num_ranks(arguments: dict) -> int:
    sizes = ("tensor_parallel_size", "pipeline_parallel_size")
    return math.prod(int(arguments.get(name, 1)) for name in sizes)


@contextmanager
def _processors_shared(num_ranks: int) -> Iterator[None]:
    """On a CPU, an equal share of this program's processors for each rank, while vLLM starts.

    vLLM itself wants a memory node for each. A person's own setting wins.
    """
    name = "VLLM_CPU_OMP_THREADS_BIND"
    if num_ranks == 1 or torch.cuda.is_available() or name in os.environ:
        yield
        return
    cpus = sorted(os.sched_getaffinity(0))
    share = len(cpus) // num_ranks
    lists = [cpus[rank * share : (rank + 1) * share] for rank in range(num_ranks)]
    os.environ[name] = "|".join(",".join(map(str, own)) for own in lists) if share else "nobind"
    from vllm import envs

    forget = getattr(envs, "disable_envs_cache", lambda: None)
    forget()  # an engine started before in this process
    try:
        yield
    finally:
        del os.environ[name]
        forget()


def import_vllm() -> Any:
    """The package.

    Raises:
        TeacherError: it cannot be imported.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        import vllm
    except ImportError as error:
        raise TeacherError(
            f"vLLM cannot be imported ({error})",
            remedy="Install it with pip install 'stillroom[cpu]' or 'stillroom[gpu]'.",
        ) from None
    return vllm
