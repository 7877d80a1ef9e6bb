"""Tiny random models whose change moves the logprobs, saved as checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import transformers

Kind = Literal["qwen3", "llama", "llama_tied", "qwen3_moe"]
KINDS: tuple[Kind, ...] = ("qwen3", "llama", "llama_tied", "qwen3_moe")
VOCAB_SIZE = 512

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "dtype": "bfloat16",
}


def config_of(kind: Kind) -> Any:
    """The transformers config of one kind."""
    if kind == "qwen3":
        return transformers.Qwen3Config(**_SHAPE, tie_word_embeddings=False)
    if kind == "qwen3_moe":
        return transformers.Qwen3MoeConfig(
            **_SHAPE,
            tie_word_embeddings=False,
            moe_intermediate_size=128,
            num_experts=8,
            num_experts_per_tok=2,
            decoder_sparse_step=1,
        )
    return transformers.LlamaConfig(**_SHAPE, tie_word_embeddings=kind == "llama_tied")


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Draw every parameter anew, wide enough that the logprobs tell two seeds apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.08, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)


def new_model(kind: Kind, seed: int) -> Any:
    """A bfloat16 model on the CPU with random weights."""
    model = transformers.AutoModelForCausalLM.from_config(config_of(kind), dtype=torch.bfloat16)
    randomize(model, seed)
    return model.eval()


def make_model(kind: Kind, folder: Path, seed: int) -> Path:
    """Save ``new_model(kind, seed)`` as a checkpoint in ``folder`` and return the folder."""
    transformers.utils.logging.disable_progress_bar()
    new_model(kind, seed).save_pretrained(folder)
    return folder
