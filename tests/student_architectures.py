"""Many small random models, one of each decoder architecture that a student may have.

One idea: one shape that nearly every config of transformers understands, and beside it what an
architecture calls otherwise or cannot do without. Four blocks, some of which differ from the others
where the architecture has blocks of several kinds.
"""

import shutil
from pathlib import Path
from typing import Any

import torch

import stillroom.pipeline  # noqa: F401  (see pipeline.cpu_wheels)

DEPTH = 4
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
_GPT = {"n_embd": 32, "n_layer": DEPTH, "n_head": 4, "n_positions": 256, "n_inner": 64}
_WINDOWS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 2,
}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "mistral": {},
    "ministral": {"head_dim": 8, **_WINDOWS},
    "phi": {},
    "phi3": {},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, **_WINDOWS},
    "gemma3_text": {"head_dim": 8, **_WINDOWS},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1], "tie_word_embeddings": True},
    "olmo": {},
    "olmo2": {},
    "olmo3": _WINDOWS,
    "cohere": {},
    "cohere2": {**_WINDOWS, "head_dim": 8},
    "stablelm": {},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 2.0},
    "helium": {"head_dim": 8},
    "bitnet": {},
    "doge": {},
    "starcoder2": {},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "exaone4": {"head_dim": 8, **_WINDOWS},
    "arcee": {"head_dim": 8},
    "seed_oss": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "nemotron": {"head_dim": 8},
    "apertus": {},
    "ernie4_5": {"head_dim": 8},
    "cwm": {"head_dim": 8},
    "vaultgemma": {"head_dim": 8, **_WINDOWS},
    "nanochat": {},
    "gpt2": _GPT,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 16},
    "gpt_neox": {},
    "gptj": {**_GPT, "rotary_dim": 8},
    "gpt_bigcode": _GPT,
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": DEPTH, "n_head": 4},
    "falcon": {"num_kv_heads": 2, "ffn_hidden_size": 64},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 16, "mlp_only_layers": [1]},
    "qwen3_moe": {**_EXPERTS, "head_dim": 8, "mlp_only_layers": [1]},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {**_ROUTED, **_LATENT},
    "glm4_moe": {**_ROUTED, "head_dim": 8},
    "dots1": {**_ROUTED, "head_dim": 8},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 16,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "afmoe": {**_EXPERTS, "head_dim": 8, "num_dense_layers": 2},
    "llama4_text": {
        "head_dim": 8,
        "num_local_experts": 4,
        "intermediate_size_mlp": 32,
        "no_rope_layers": [1, 1, 0, 1],
        "moe_layers": [1, 3],
        "attention_chunk_size": 16,
    },
    "minicpm3": _LATENT,
    "jamba": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 0,
        "use_mamba_kernels": False,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "qwen3_next": {
        **_EXPERTS,
        "head_dim": 8,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "rwkv": {"attention_hidden_size": 32},
    "recurrent_gemma": {"block_types": ["recurrent", "recurrent", "attention"], "lru_width": 32},
    "mamba": {"state_size": 8},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "conv"]},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, **_WINDOWS},
}
"""Model type of transformers -> what its config needs beside `SHAPE`."""


def config_of(architecture: str, vocab_size: int, **more: Any) -> Any:
    """A config of four blocks, 32 wide."""
    from transformers import CONFIG_MAPPING

    shape = {**SHAPE, "vocab_size": vocab_size, **ARCHITECTURES[architecture], **more}
    return CONFIG_MAPPING[architecture](**shape)


def save_model(
    architecture: str, directory: Path, tokenizer: Path, vocab_size: int, seed: int = 0, **more
) -> Path:
    """A random model of an architecture, fp32, as an HF directory with a copy of a tokenizer."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config_of(architecture, vocab_size, **more))
        _roughen(model)
    model.float().save_pretrained(directory)
    for path in tokenizer.iterdir():
        shutil.copyfile(path, directory / path.name)
    return directory


@torch.no_grad()
def _roughen(model: Any) -> None:
    """Weights that begin as zeros or ones say something too."""
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
