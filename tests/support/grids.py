"""Small models of every declared family and their checkpoints, for any grid."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.families import CONFIGS
from weightsync.families import ModelConfig, declare
from weightsync.families.model import Model

SMALL: dict[str, Any] = {
    "vocab_size": 70,
    "hidden_size": 24,
    "intermediate_size": 16,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "q_lora_rank": 6,
    "kv_lora_rank": 5,
    "qk_nope_head_dim": 3,
    "qk_rope_head_dim": 2,
    "v_head_dim": 4,
}
#: wide enough for a block of 128 in every worker's part
WIDE: dict[str, Any] = {
    "vocab_size": 70,
    "hidden_size": 200,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "q_lora_rank": 128,
    "kv_lora_rank": 70,
    "qk_nope_head_dim": 100,
    "qk_rope_head_dim": 28,
    "v_head_dim": 156,
}


def model_of(name: str, wire_dtype: str) -> Model:
    values = {**CONFIGS[name], **(WIDE if wire_dtype == "fp8" else SMALL)}
    if wire_dtype == "bf16" and "head_dim" in values:
        values["head_dim"] = 6
    if CONFIGS[name].get("q_lora_rank", 1) is None:
        values["q_lora_rank"] = None
    return declare(ModelConfig(values), wire_dtype=wire_dtype)


def checkpoint(model: Model, seed: int = 0) -> dict[str, torch.Tensor]:
    """Bytes that differ everywhere, whatever they mean as numbers."""
    made: dict[str, torch.Tensor] = {}
    for place, spec in enumerate(model.manifest, 1000 * seed):
        generator = torch.Generator().manual_seed(place)
        dtype = getattr(torch, spec.dtype)
        if dtype == torch.bfloat16:  # may be cast, so it is a number
            made[spec.name] = torch.randn(spec.shape, generator=generator).to(dtype)
        else:
            raw = torch.randint(0, 120, (spec.nbytes,), dtype=torch.uint8, generator=generator)
            made[spec.name] = raw.view(dtype).reshape(spec.shape)
    return made
