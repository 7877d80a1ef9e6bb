"""Random models whose change shows: any Hugging Face causal language model, from its config."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from weightsync.errors import InputError

#: of a matrix with 256 columns: 0.08.  Much less, and the logprobs hardly move with the weights.
_MATRIX_STD_AT_1 = 0.08 * 16.0
_BIAS_STD = 0.05


def new_model(config_file: Path | None) -> Any:
    """A bfloat16 model on the CPU; its weights are not drawn yet.

    A quantisation that the config names is dropped: the weights are bfloat16.

    Raises:
        InputError: transformers knows no causal language model for it.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        config = (
            _tiny_qwen3()
            if config_file is None
            else transformers.AutoConfig.from_pretrained(str(config_file), local_files_only=True)
        )
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        config.dtype = torch.bfloat16
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    # what a wrong config raises comes from anywhere in a model's code
    except Exception as error:
        raise InputError(
            f"no causal language model can be made from the config {config_file}: "
            f"{type(error).__name__}: {error}",
            hint="--model-config takes the config.json of a model that transformers can generate "
            "text with",
        ) from error
    return model.eval().requires_grad_(False)


def draw_weights(model: nn.Module, seed: int) -> None:
    """Give every weight a new random value, the same for the same seed, sharded or not.

    Matrices get a standard deviation that goes with their fan-in, so that activations keep their
    size at any width; norms lie in 0.5 to 1.5; biases, kept in buffers or not, are small.
    """
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    biases = [(n, b) for n, b in model.named_buffers() if _is_bias(n) and b.is_floating_point()]
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *biases]:
            if not isinstance(weight, DTensor):
                _draw(name, weight, generator)
                continue
            # every rank draws all of it, and keeps its shard
            whole = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
            _draw(name, whole, generator)
            part = distribute_tensor(
                whole, weight.device_mesh, weight.placements, src_data_rank=None
            )
            weight.to_local().copy_(part.to_local())


def describe_model(model: Any) -> dict[str, Any]:
    """What the demo has to know of it: sizes, and what a prompt may hold."""
    config = model.config.get_text_config()
    parameters = list(model.parameters())
    return {
        "name": type(model).__name__,
        "parameters": sum(p.numel() for p in parameters),
        "nbytes": sum(p.numel() * p.element_size() for p in parameters),
        "vocab_size": int(config.vocab_size),
        "max_positions": getattr(config, "max_position_embeddings", None),
    }


def _draw(name: str, weight: torch.Tensor, generator: torch.Generator) -> None:
    if _is_bias(name):
        weight.normal_(0.0, _BIAS_STD, generator=generator)
    elif weight.ndim > 1:
        weight.normal_(0.0, _MATRIX_STD_AT_1 / math.sqrt(weight.shape[-1]), generator=generator)
    else:
        weight.uniform_(0.5, 1.5, generator=generator)


def _is_bias(name: str) -> bool:
    return name.endswith("bias")


def _tiny_qwen3() -> Any:
    import transformers

    return transformers.Qwen3Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
