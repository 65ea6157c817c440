"""Engine arguments of a teacher: which change its answers, and what transformers makes of them.

One idea: an argument counts unless it is on the list of those that only say how fast, where or with
how much talk the model runs; so one that a later vLLM brings counts. What counts is applied or
refused: `hf_overrides` change a model's config under both engines, in transformers through the
config file, so that it reads old and new keys alike; what vLLM alone can do is refused where
transformers runs the model. It loads no model.
"""

import json
from pathlib import Path
from typing import Any

from stillroom.cache_schemas.errors import ConfigError
from stillroom.pipeline.config import Teacher

SPEED_AND_PLACEMENT = frozenset(
    (
        # where it runs, and on how many devices
        "cp_kv_cache_interleave_size",
        "data_parallel_address",
        "data_parallel_backend",
        "data_parallel_external_lb",
        "data_parallel_hybrid_lb",
        "data_parallel_multi_port_external_lb",
        "data_parallel_rank",
        "data_parallel_rpc_port",
        "data_parallel_size",
        "data_parallel_size_local",
        "data_parallel_start_rank",
        "dcp_comm_backend",
        "dcp_kv_cache_interleave_size",
        "decode_context_parallel_size",
        "device_ids",
        "disable_custom_all_reduce",
        "distributed_executor_backend",
        "distributed_timeout_seconds",
        "enable_eplb",
        "enable_expert_parallel",
        "eplb_config",
        "expert_placement_strategy",
        "master_addr",
        "master_port",
        "mm_encoder_tp_mode",
        "nnodes",
        "node_rank",
        "numa_bind",
        "numa_bind_cpus",
        "numa_bind_nodes",
        "pipeline_parallel_size",
        "prefill_context_parallel_size",
        "tensor_parallel_size",
        # how files are read: weights are hashed, and what was loaded is measured
        "download_dir",
        "hf_token",
        "max_parallel_loading_workers",
        "pt_load_map_location",
        "safetensors_load_strategy",
        "safetensors_prefetch_block_size",
        "safetensors_prefetch_num_threads",
        "use_tqdm_on_load",
        # memory
        "block_size",
        "cpu_offload_gb",
        "cpu_offload_params",
        "enable_sleep_mode",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "mm_processor_cache_gb",
        "mm_processor_cache_type",
        "num_gpu_blocks_override",
        "offload_backend",
        "offload_group_size",
        "offload_num_in_group",
        "offload_params",
        "offload_prefetch_step",
        "skip_mm_profiling",
        "swap_space",
        # the scheduler, and how the same kernels are launched
        "async_scheduling",
        "compilation_config",
        "cudagraph_capture_sizes",
        "disable_cascade_attn",
        "disable_chunked_mm_input",
        "enable_chunked_prefill",
        "enforce_eager",
        "long_prefill_token_threshold",
        "max_cudagraph_capture_size",
        "max_num_batched_tokens",
        "max_num_partial_prefills",
        "max_num_scheduled_tokens",
        "max_num_seqs",
        "renderer_num_workers",
        "scheduling_policy",
        "stream_interval",
        # what is told of it
        "aggregate_engine_logging",
        "cudagraph_metrics",
        "disable_log_stats",
        "enable_logging_iteration_details",
        "enable_mfu_metrics",
        "log_level",
        "otlp_traces_endpoint",
        "ray_workers_use_nsight",
        "served_model_name",
        "shutdown_timeout",
    )
)
"""vLLM engine arguments that do not change what the teacher says, noise apart.

Not here, although one might think so: `max_model_len` (LongRoPE picks its factors by it),
`load_format` (says which of several files is the model), `attention_backend` and the other kernel
choices (not every kernel knows every soft cap and window), `kv_cache_dtype`, `hf_overrides`."""

HOW_VLLM_SERVES = frozenset(("attention_backend", "load_format", "max_model_len"))
"""Engine arguments that count, as which file, kernel or table of factors vLLM takes may change what
it says, but that choose nothing in the model's definition: transformers runs without them."""
WHERE = "[teacher.engine_args]"


def meaningful(engine_args: dict[str, Any]) -> dict[str, Any]:
    """The arguments that belong to a teacher's identity."""
    return {key: value for key, value in engine_args.items() if key not in SPEED_AND_PLACEMENT}


def check_applicable(teacher: Teacher) -> None:
    """Refuse what transformers cannot do and would change the answers.

    Raises:
        ConfigError: names the arguments.
    """
    known = SPEED_AND_PLACEMENT | HOW_VLLM_SERVES | {"hf_overrides"}
    beyond = sorted(teacher.engine_args.keys() - known)
    if teacher.quantization:
        beyond.append("quantization")
    if beyond:
        raise ConfigError(
            f"the reference engine cannot apply {', '.join(beyond)}",
            expected="engine arguments that leave the answers alone, or hf_overrides",
            where=WHERE,
            remedy="Leave them out for this command, or use `--engine vllm`.",
        )


def overridden(config: Any, directory: Path, teacher: Teacher) -> Any:
    """The config that `hf_overrides` make of a model's own.

    Args:
        config: of the model, as transformers reads it.
        directory: where its config.json is.
        teacher: with the engine arguments.

    Raises:
        ConfigError: an override says nothing to transformers, or is none that it takes.
    """
    overrides = teacher.engine_args.get("hf_overrides") or {}
    if not overrides:
        return config
    if not isinstance(overrides, dict):
        raise ConfigError("hf_overrides is not a table", where=f"{WHERE} hf_overrides")
    for key, value in overrides.items():
        if not _is_heard(config, directory, key, value):
            raise ConfigError(
                f"{key} = {value!r} changes nothing in {type(config).__name__}",
                where=f"{WHERE} hf_overrides",
                remedy="Use the key as the model's config.json has it (rope: `rope_parameters`).",
            )
    return _with(config, directory, overrides)


def _is_heard(config: Any, directory: Path, key: str, value: Any) -> bool:
    """Whether an override by itself changes what transformers knows of this model.

    Keys that a class does not know become attributes of the config, which say nothing.
    """
    before, after = (_with(config, directory, each).to_dict() for each in ({}, {key: value}))
    changed = {name for name in after if after[name] != before.get(name)}
    return before.get(key) == value or bool(changed - ({key} - before.keys()))


def _with(config: Any, directory: Path, overrides: dict) -> Any:
    written = json.loads((directory / "config.json").read_text())
    try:
        return type(config).from_dict(_merged(written, overrides))
    except Exception as error:  # whatever a class raises at values that it does not take
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{type(config).__name__} does not take these ({reason})",
            where=f"{WHERE} hf_overrides",
            remedy="Use keys and values as the model's config.json has them.",
        ) from None


def _merged(written: dict, overrides: dict) -> dict:
    """Nested tables are merged, as vLLM does; everything else is replaced."""
    made = dict(written)
    for key, value in overrides.items():
        inner = made.get(key)
        both = isinstance(value, dict) and isinstance(inner, dict)
        made[key] = _merged(inner, value) if both else value  # type: ignore[arg-type]
    return made
