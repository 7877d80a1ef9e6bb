"""Tiny configs of every declared family."""

from __future__ import annotations

from typing import Any

_DENSE: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
_DEEPSEEK: dict[str, Any] = {
    **_DENSE,
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "num_key_value_heads": 8,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 2,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "rope_theta": 10000,
    "num_nextn_predict_layers": 1,
}
del _DEEPSEEK["head_dim"]

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        **_DENSE,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama_tied": {
        **_DENSE,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "tie_word_embeddings": True,
    },
    "qwen2": {
        **{key: value for key, value in _DENSE.items() if key != "head_dim"},
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
    },
    "qwen3": {**_DENSE, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "qwen3_moe": {
        **_DENSE,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
        "norm_topk_prob": True,
    },
    "mixtral": {
        **_DENSE,
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
    },
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v2": {
        **_DEEPSEEK,
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "n_shared_experts": 1,
    },
    "glm4_moe": {
        **_DENSE,
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "attention_bias": True,
        "use_qk_norm": True,
        "moe_intermediate_size": 128,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "partial_rotary_factor": 0.5,
    },
}

#: what marks an fp8 checkpoint for vLLM
_FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": [
        "lm_head",
        *(f"model.layers.{layer}.mlp.gate" for layer in range(3)),
        *(f"model.layers.{layer}.block_sparse_moe.gate" for layer in range(3)),
    ],
}


def quantized(name: str) -> dict[str, Any]:
    """The config of a family's fp8 checkpoint, with room for a block in every worker's part."""
    wide = {"intermediate_size": 1024, "moe_intermediate_size": 1024, "quantization_config": _FP8}
    if "kv_lora_rank" in CONFIGS[name]:
        wide["v_head_dim"] = 128
    else:
        wide |= {"head_dim": 128, "num_key_value_heads": 4}
    return {**CONFIGS[name], **wide}
