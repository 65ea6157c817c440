"""Engine arguments of a teacher: which change its answers.

One idea: an argument counts unless it is on the list of those that only say how fast, where or with
how much talk the model runs; so one that a later vLLM brings counts. It loads no model.
"""

from typing import Any

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


def meaningful(engine_args: dict[str, Any]) -> dict[str, Any]:
    """The arguments that belong to a teacher's identity."""
    return {key: value for key, value in engine_args.items() if key not in SPEED_AND_PLACEMENT}
