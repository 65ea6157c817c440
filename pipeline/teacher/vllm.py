"""The teacher under vLLM: every signal from tensors, no Python object per token and rank.

One idea: a request carries a mark; the worker (see `vllm_worker`) answers it with matrices; the driver's
output processor passes them through. Before the first real request the engine asks a few prompts
both ways, its own and vLLM's public API, and refuses to work where they differ.

The alignment shift happens in the worker, where row t meets token t+1. Prefix caching is off: a
position served from it has no logits.
"""

import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from cache_schemas.errors import TeacherError
from cache_schemas.signals import hidden_name
from pipeline.config import Capture, Teacher
from pipeline.record import Example, TeacherRecord
from pipeline.teacher import engine
from pipeline.teacher.facts import model_directory, model_shape
from pipeline.teacher.rows import RowSpec, draw_key

VLLM_VERSION = "0.32.0"
MARK = "stillroom"
SCRATCH_BYTES = 256 << 20
IN_FLIGHT_TOKENS = 1 << 17
"""Prompt tokens handed to the scheduler ahead of the one being waited for."""


class VllmEngine:
    """A teacher under vLLM, in this process (its workers may be others)."""

    def __init__(self, teacher: Teacher, capture: Capture):
        self.shape = model_shape(teacher)
        self._teacher, self._capture = teacher, capture
        self._spec = RowSpec.of(capture)
        self._layers = sorted(layer for layer in capture.hidden_layers if layer != "final")
        self._llm = _start(teacher, self._additional_config())
        self._context = self._llm.model_config.max_model_len - 1
        self._serial = 0
        from pipeline.teacher.self_test import self_test

        self_test(self)

    def facts(self) -> dict:
        import vllm

        return {"name": "vllm", "version": vllm.__version__, "torch": torch.__version__}

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None

    def score(self, examples: Sequence[Example]) -> Iterator[TeacherRecord]:
        waiting = iter(examples)
        order: list[tuple[str, Example]] = []
        finished: dict[str, object] = {}
        ahead = 0
        while True:
            while ahead < IN_FLIGHT_TOKENS and (example := next(waiting, None)) is not None:
                engine.check_example(example, self.shape, self._context)
                order.append((self._add(example), example))
                ahead += len(example.token_ids)
            if not order:
                return
            while order[0][0] not in finished:
                for output in self._llm.llm_engine.step():
                    if output.finished:
                        finished[output.request_id] = output
            request_id, example = order.pop(0)
            ahead -= len(example.token_ids)
            yield self._record(example, finished.pop(request_id))

    def _additional_config(self) -> dict:
        return {
            MARK: {
                "spec": self._spec.to_json(),
                "layers": self._layers,
                "final": "final" in self._capture.hidden_layers,
                "scratch_bytes": SCRATCH_BYTES,
            }
        }

    def _add(self, example: Example) -> str:
        """Hand an example to vLLM's scheduler; returns the request's id."""
        mark = {
            "key": draw_key(self._spec.seed, example.example_id),
            "first_row": example.first_row,
            "positions": engine.hidden_positions(example, self._capture).tobytes(),
        }
        self._serial += 1
        request_id = f"{self._serial}-{example.example_id}"
        prompt = {"prompt_token_ids": example.token_ids.tolist()}
        self._llm.llm_engine.add_request(request_id, prompt, _sampling({MARK: mark}))
        return request_id

    def _record(self, example: Example, output) -> TeacherRecord:
        answer = output.prompt_logprobs
        tensors = getattr(answer, "tensors", None)
        if tensors is None or len(tensors[0]) != example.num_rows:
            got = "none" if tensors is None else str(len(tensors[0]))
            raise TeacherError(
                f"vLLM returned {got} of {example.num_rows} rows",
                where=f"example {example.example_id}",
                remedy="Report this with your vLLM version; `--engine reference` is not affected.",
            )
        ints, floats, states = tensors
        signals = self._spec.unpack(ints.numpy(), floats.numpy())
        engine.check_finite(example, example.first_row, signals)
        names = [*self._layers, *(["final"] if "final" in self._capture.hidden_layers else [])]
        for i, layer in enumerate(names):
            signals[hidden_name(layer)] = states[:, i].float().numpy()
        positions = engine.hidden_positions(example, self._capture)
        return TeacherRecord(example, example.first_row, signals, positions)


def _sampling(extra_args: dict | None, num_logprobs: int = 1):
    """One forward over the prompt and nothing else."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=num_logprobs,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=extra_args,
    )


def _start(teacher: Teacher, additional_config: dict):
    """Start vLLM.

    Raises:
        TeacherError: it is not installed, or it cannot serve this model.
    """
    _set_environment()
    vllm = _import_vllm()
    from pipeline.teacher import vllm_driver

    vllm_driver.install()
    arguments = {
        "model": str(model_directory(teacher)),
        "dtype": teacher.dtype,
        "quantization": teacher.quantization or None,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "worker_extension_cls": "pipeline.teacher.vllm_worker.WorkerExtension",
        "additional_config": additional_config,
    }
    if not torch.cuda.is_available():
        arguments["enforce_eager"] = True
    try:
        return vllm.LLM(**arguments | teacher.engine_args)
    except Exception as error:
        raise _explain(error, teacher) from error


def _set_environment() -> None:
    """Settings that vLLM reads from the environment only; a person's own values win."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # tensors stay in this process
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # The hooks on the newer runner have not been run on a GPU: use the one that was tested.
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")


def _import_vllm():
    try:
        import vllm
    except ImportError as error:
        raise TeacherError(
            f"vLLM cannot be imported ({error})",
            remedy="Install it with pip install 'stillroom[cpu]' or 'stillroom[gpu]'.",
        ) from None
    return vllm


def _explain(error: Exception, teacher: Teacher) -> Exception:
    """What a person can do about an engine that did not start."""
    reason = str(error).strip().splitlines()
    remedy = "See vLLM's message above; `--engine reference` runs what transformers can load."
    text = str(error).lower()
    if "out of memory" in text or "kv cache" in text or "memory" in text:
        remedy = (
            "Set gpu_memory_utilization, max_model_len or tensor_parallel_size under "
            "[teacher.engine_args] (on a CPU: VLLM_CPU_KVCACHE_SPACE, in GiB)."
        )
    return TeacherError(
        f"vLLM cannot serve this model ({reason[-1] if reason else type(error).__name__})",
        where=teacher.model,
        remedy=remedy,
    )
