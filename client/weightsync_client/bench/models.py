"""The models that are pushed: configs alone, weights are random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: bytes from which on a model is this wide
_WIDTHS = ((2_000_000_000, 4096), (64_000_000, 1024), (0, 256))
_VOCAB = 4096


def dense(nbytes: int) -> dict[str, Any]:
    """A bfloat16 Qwen3 of about that many bytes: at least one layer."""
    width = next(width for least, width in _WIDTHS if nbytes >= least)
    config = _qwen3(width, 3 * width, layers=1, heads=width // 64, head_dim=64, vocab=_VOCAB)
    # q, o: width²; k, v: a quarter of it; gate, up, down: 3 width² each
    layer_nbytes = 2 * width * width * (2 + 0.5 + 9)
    ends_nbytes = 2 * 2 * _VOCAB * width
    config["num_hidden_layers"] = max(1, round((nbytes - ends_nbytes) / layer_nbytes))
    return config


def qwen3_8b() -> dict[str, Any]:
    """The shape of Qwen3-8B: 16.38 GB in bfloat16."""
    return _qwen3(4096, 12_288, layers=36, heads=32, head_dim=128, vocab=151_936)


def many_experts() -> dict[str, Any]:
    """128 experts in each of 48 layers, 18,432 small matrices: 15 GB in bfloat16."""
    return _qwen3(1024, 3072, layers=48, heads=16, head_dim=64, vocab=32_000) | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 384,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
    }


def as_fp8(config: dict[str, Any]) -> dict[str, Any]:
    """The same model for an engine that serves fp8 blocks of 128×128."""
    return config | {
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head"],
        }
    }


def shrunk(config: dict[str, Any], width: int = 64, layers: int = 2) -> dict[str, Any]:
    """The same family, small enough for a test: the same modules, a few kilobytes each."""
    small = config | {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": width // 4,
        "vocab_size": 128,
    }
    if "num_experts" in config:
        small |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": width}
    return small


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    """Make a folder that holds the config alone, as an engine with dummy weights takes it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(config, indent=1))
    return path


def _qwen3(
    width: int, inner: int, *, layers: int, heads: int, head_dim: int, vocab: int
) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(heads // 4, 1),
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "use_cache": True,
    }
