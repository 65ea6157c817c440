"""Tiny random models of many architectures, each with the conventions of its family that bite.

One idea: a model is its transformers class and the settings that differ from a common small shape;
weights are drawn wide, so that answers are peaked and a wrong convention shows at once.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VOCABULARY = 512
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": True,
}
BROAD = {"head_dim": None, "num_attention_heads": 2, "num_key_value_heads": 2}
"""Configs that divide their width by their heads: heads of 32, which CPUs can serve."""
GPT = {
    **BROAD,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 2,
    "n_positions": 512,
    "n_inner": 128,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
MLA = {
    "tie_word_embeddings": False,
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "head_dim": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
STATE = {"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}


@dataclass(frozen=True)
class Kind:
    """One tiny model.

    Attributes:
        model: class of transformers.
        says: the conventions that it is there for.
        settings: of its config, beside `SHAPE`.
    """

    model: str
    says: str
    settings: dict[str, Any] = field(default_factory=dict)


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


ZOO: dict[str, Kind] = {
    "llama": Kind("LlamaForCausalLM", "tied"),
    "llama-biased": Kind(
        "LlamaForCausalLM",
        "untied, biases",
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-llama3-rope": Kind(
        "LlamaForCausalLM",
        "llama3 rope",
        _rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "llama-yarn": Kind(
        "LlamaForCausalLM",
        "yarn rope",
        _rope("yarn", factor=4.0, original_max_position_embeddings=128),
    ),
    "llama-linear-rope": Kind("LlamaForCausalLM", "linear rope", _rope("linear", factor=4.0)),
    "llama-dynamic-rope": Kind(
        "LlamaForCausalLM",
        "dynamic rope, longest text 150 of 200",
        {"max_position_embeddings": 200, **_rope("dynamic", factor=4.0)},
    ),
    "mistral": Kind("MistralForCausalLM", "sliding window", {"sliding_window": 32}),
    "ministral": Kind("MinistralForCausalLM", "sliding window by layer", {"sliding_window": 32}),
    "mixtral": Kind("MixtralForCausalLM", "MoE", {"num_local_experts": 4}),
    "qwen2": Kind("Qwen2ForCausalLM", "biased q, k, v", BROAD),
    "qwen2-sliding": Kind(
        "Qwen2ForCausalLM",
        "sliding window in some layers",
        {**BROAD, "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
    ),
    "qwen2-moe": Kind(
        "Qwen2MoeForCausalLM",
        "MoE with a shared expert",
        {**BROAD, **EXPERTS, "shared_expert_intermediate_size": 64},
    ),
    "qwen3": Kind("Qwen3ForCausalLM", "q and k norms, untied", {"tie_word_embeddings": False}),
    "qwen3-moe": Kind("Qwen3MoeForCausalLM", "MoE, normed weights", EXPERTS),
    "qwen3-next": Kind(
        "Qwen3NextForCausalLM",
        "hybrid: gated delta net, MoE",
        {
            **EXPERTS,
            **LINEAR,
            "shared_expert_intermediate_size": 64,
            "tie_word_embeddings": False,
        },
    ),
    "qwen3.5": Kind("Qwen3_5ForCausalLM", "hybrid: gated delta net", LINEAR),
    "gemma": Kind("GemmaForCausalLM", "scaled embeddings"),
    "gemma2": Kind(
        "Gemma2ForCausalLM",
        "soft caps of attention and logits, sliding window",
        {
            "sliding_window": 32,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 10.0,
            "query_pre_attn_scalar": 32,
        },
    ),
    "gemma3": Kind(
        "Gemma3ForCausalLM",
        "two ropes, sliding window",
        {"sliding_window": 32, "layer_types": SLIDING, "query_pre_attn_scalar": 32},
    ),
    "gemma3n": Kind(
        "Gemma3nForCausalLM",
        "several streams, inputs of each layer",
        {
            "sliding_window": 32,
            "layer_types": SLIDING,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 16,
            "num_kv_shared_layers": 0,
            "laurel_rank": 8,
            "intermediate_size": [128] * 3,
            "activation_sparsity_pattern": [0.0] * 3,
        },
    ),
    "gemma4": Kind(
        "Gemma4ForCausalLM",
        "sliding window, soft cap",
        {
            "sliding_window": 32,
            "layer_types": [*SLIDING[:2], "full_attention"],
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "global_head_dim": 32,
        },
    ),
    "phi": Kind(
        "PhiForCausalLM", "partial rope, biased head", {**BROAD, "tie_word_embeddings": False}
    ),
    "phi3": Kind(
        "Phi3ForCausalLM", "fused projections, sliding window", {**BROAD, "sliding_window": 32}
    ),
    "phi3-longrope": Kind(
        "Phi3ForCausalLM",
        "LongRoPE: factors by length",
        {
            **BROAD,
            "original_max_position_embeddings": 64,
            **_rope(
                "longrope",
                short_factor=[1.0] * 16,
                long_factor=[8.0] * 16,
                original_max_position_embeddings=64,
            ),
        },
    ),
    "phimoe": Kind(
        "PhimoeForCausalLM",
        "MoE by sparse mixer, biased head",
        {"num_local_experts": 4, "attention_bias": True, "lm_head_bias": True},
    ),
    "gpt2": Kind("GPT2LMHeadModel", "learned positions", GPT),
    "gptj": Kind(
        "GPTJForCausalLM",
        "partial rope, biased head",
        {**GPT, "rotary_dim": 8, "tie_word_embeddings": False},
    ),
    "gpt-neox": Kind(
        "GPTNeoXForCausalLM",
        "parallel residual, partial rope",
        {**BROAD, "tie_word_embeddings": False},
    ),
    "gpt-bigcode": Kind("GPTBigCodeForCausalLM", "one key and value head", GPT),
    "bloom": Kind("BloomForCausalLM", "ALiBi", {**BROAD, "n_layer": 3, "n_head": 2}),
    "falcon": Kind(
        "FalconForCausalLM",
        "parallel residual, one key and value head",
        {**BROAD, "new_decoder_architecture": False, "multi_query": True, "alibi": False},
    ),
    "falcon-new": Kind(
        "FalconForCausalLM",
        "new decoder, grouped heads",
        {
            **BROAD,
            "num_attention_heads": 2,
            "new_decoder_architecture": True,
            "num_kv_heads": 1,
            "alibi": False,
        },
    ),
    "mpt": Kind("MptForCausalLM", "ALiBi", {**BROAD, "d_model": 64, "n_heads": 2, "n_layers": 3}),
    "opt": Kind(
        "OPTForCausalLM",
        "offset positions, post projection",
        {**BROAD, "ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0},
    ),
    "stablelm": Kind("StableLmForCausalLM", "partial rope, LayerNorm", BROAD),
    "starcoder2": Kind(
        "Starcoder2ForCausalLM", "biases, sliding window", {**BROAD, "sliding_window": 32}
    ),
    "olmo": Kind(
        "OlmoForCausalLM", "norm without weights, clipped q, k, v", {**BROAD, "clip_qkv": 1.0}
    ),
    "olmo2": Kind("Olmo2ForCausalLM", "post norms", BROAD),
    "olmo3": Kind(
        "Olmo3ForCausalLM", "post norms, sliding window", {**BROAD, "sliding_window": 32}
    ),
    "olmoe": Kind(
        "OlmoeForCausalLM", "MoE, q and k norms", {**EXPERTS, **BROAD, "tie_word_embeddings": False}
    ),
    "olmoe-tied": Kind("OlmoeForCausalLM", "the same, tied", {**EXPERTS, **BROAD}),
    "cohere": Kind("CohereForCausalLM", "factor on the logits", {"logit_scale": 0.25}),
    "cohere2": Kind(
        "Cohere2ForCausalLM",
        "factor on the logits, sliding window, layers without rope",
        {"logit_scale": 0.25, "sliding_window": 32, "layer_types": SLIDING},
    ),
    "granite": Kind(
        "GraniteForCausalLM",
        "divided logits, scaled residuals, embeddings and attention",
        {
            "logits_scaling": 4.0,
            "residual_multiplier": 0.5,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.1,
        },
    ),
    "granite-moe": Kind(
        "GraniteMoeForCausalLM",
        "MoE, divided logits",
        {
            **BROAD,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "logits_scaling": 4.0,
            "residual_multiplier": 0.5,
        },
    ),
    "granite-hybrid": Kind(
        "GraniteMoeHybridForCausalLM",
        "hybrid: Mamba 2 and attention, divided logits",
        {
            **BROAD,
            **STATE,
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 16,
            "layer_types": ["mamba", "attention", "mamba"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 64,
            "logits_scaling": 4.0,
            "position_embedding_type": "rope",
        },
    ),
    "hyperclovax": Kind(
        "HyperCLOVAXForCausalLM", "multiplied logits, post norms", {"logits_scaling": 0.25}
    ),
    "smollm3": Kind("SmolLM3ForCausalLM", "layers without rope", {"no_rope_layers": [1, 1, 0]}),
    "deepseek-v2": Kind("DeepseekV2ForCausalLM", "MLA, MoE", MLA),
    "deepseek-v3": Kind(
        "DeepseekV3ForCausalLM", "MLA, MoE by sigmoid", {**MLA, "topk_method": "noaux_tc"}
    ),
    "minicpm3": Kind(
        "MiniCPM3ForCausalLM",
        "MLA, divided states, scaled embeddings",
        {
            **{name: MLA[name] for name in MLA if name.endswith(("_rank", "_dim"))},
            "num_key_value_heads": 4,
            "scale_emb": 3,
            "dim_model_base": 8,
            "scale_depth": 1.4,
        },
    ),
    "mamba": Kind(
        "MambaForCausalLM",
        "no attention",
        {"state_size": 16, "time_step_rank": 4, "head_dim": None},
    ),
    "mamba2": Kind(
        "Mamba2ForCausalLM",
        "no attention",
        {
            "state_size": 16,
            "num_heads": 4,
            "head_dim": 32,
            "n_groups": 1,
            "chunk_size": 16,
        },
    ),
    "falcon-mamba": Kind("FalconMambaForCausalLM", "no attention", {"state_size": 16}),
    "jamba": Kind(
        "JambaForCausalLM",
        "hybrid: Mamba, attention, MoE",
        {
            **BROAD,
            **STATE,
            "tie_word_embeddings": False,
            "mamba_dt_rank": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "use_mamba_kernels": False,
        },
    ),
    "falcon-h1": Kind(
        "FalconH1ForCausalLM",
        "hybrid in each block, factors everywhere",
        {
            "mamba_d_ssm": 128,
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_n_groups": 1,
            "mamba_d_state": 16,
            "mamba_chunk_size": 16,
            "lm_head_multiplier": 0.25,
            "embedding_multiplier": 3.0,
            "attention_out_multiplier": 0.7,
            "ssm_out_multiplier": 0.6,
            "key_multiplier": 0.8,
        },
    ),
    "zamba2": Kind(
        "Zamba2ForCausalLM",
        "hybrid: shared attention",
        {
            "mamba_d_state": 16,
            "mamba_expand": 2,
            "n_mamba_heads": 4,
            "mamba_ngroups": 1,
            "chunk_size": 16,
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "hybrid_layer_ids": [1],
            "num_mem_blocks": 1,
            "num_key_value_heads": 4,
            "adapter_rank": 8,
        },
    ),
    "lfm2": Kind(
        "Lfm2ForCausalLM",
        "hybrid: short convolutions",
        {
            **BROAD,
            "layer_types": ["conv", "full_attention", "conv"],
            "block_auto_adjust_ff_dim": False,
            "block_dim": 64,
            "conv_dim": 64,
        },
    ),
    "nemotron": Kind("NemotronForCausalLM", "squared ReLU, LayerNorm + 1, partial rope"),
    "exaone4": Kind(
        "Exaone4ForCausalLM",
        "post norms, sliding window, layers without rope",
        {"sliding_window": 32, "layer_types": SLIDING},
    ),
    "glm": Kind("GlmForCausalLM", "partial interleaved rope"),
    "glm4": Kind("Glm4ForCausalLM", "sandwich norms"),
    "glm4-moe": Kind(
        "Glm4MoeForCausalLM",
        "MoE by sigmoid, partial rope",
        {
            "tie_word_embeddings": False,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "ernie4.5": Kind("Ernie4_5ForCausalLM", "interleaved rope"),
    "ernie4.5-biased": Kind("Ernie4_5ForCausalLM", "the same with biases", {"use_bias": True}),
    "apertus": Kind("ApertusForCausalLM", "xIELU, q and k norms"),
    "arcee": Kind("ArceeForCausalLM", "squared ReLU"),
    "seed-oss": Kind("SeedOssForCausalLM", "biases"),
    "hunyuan": Kind("HunYuanDenseV1ForCausalLM", "q and k norms after rope"),
    "gpt-oss": Kind(
        "GptOssForCausalLM",
        "attention sinks, MoE, sliding window, yarn",
        {
            "tie_word_embeddings": False,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 32,
            "layer_types": SLIDING,
            **_rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=128,
                beta_fast=32.0,
                beta_slow=1.0,
                truncate=False,
            ),
        },
    ),
    "llama4": Kind(
        "Llama4ForCausalLM",
        "MoE, chunked attention, layers without rope",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 128,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 128,
            "no_rope_layers": [1, 1, 0],
        },
    ),
    "dbrx": Kind(
        "DbrxForCausalLM",
        "MoE, clipped q, k, v",
        {
            **BROAD,
            "tie_word_embeddings": False,
            "d_model": 64,
            "n_heads": 2,
            "n_layers": 3,
            "max_seq_len": 512,
            "attn_config": {"kv_n_heads": 1, "clip_qkv": 1.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "vaultgemma": Kind(
        "VaultGemmaForCausalLM",
        "soft caps, sliding window",
        {
            "sliding_window": 32,
            "layer_types": SLIDING,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    "persimmon": Kind("PersimmonForCausalLM", "squared ReLU, q and k norms, partial rope", BROAD),
    "xglm": Kind(
        "XGLMForCausalLM",
        "sinusoidal positions, scaled embeddings",
        {
            **BROAD,
            "d_model": 64,
            "ffn_dim": 128,
            "num_layers": 3,
            "attention_heads": 2,
            "dropout": 0.0,
        },
    ),
    "paligemma": Kind("PaliGemmaForConditionalGeneration", "prefix seen both ways"),
}
"""Label -> model."""


def save(label: str, directory: Path) -> Path:
    """Draw a model's weights, the same every time, and save it in fp32."""
    import torch
    import transformers

    kind = ZOO[label]
    model_class = getattr(transformers, kind.model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(_config(model_class, kind)).float().eval()
        _widen(model)
    model.save_pretrained(directory)
    return directory


def _config(model_class: Any, kind: Kind) -> Any:
    if kind.model != "PaliGemmaForConditionalGeneration":
        settings = {k: v for k, v in (SHAPE | kind.settings).items() if v is not None}
        return model_class.config_class(**settings)
    seen = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "projection_dim": 64,
    }
    text = SHAPE | {"model_type": "gemma"}
    return model_class.config_class(text_config=text, vision_config=seen, image_token_index=3)


def _widen(model: Any) -> None:
    """Biases and norms as trained models have them, not zeros and ones."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)
            elif parameter.dim() == 1 and "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
