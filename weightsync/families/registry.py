"""The families that can be planned for without an engine, by the ``model_type`` of their config."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from weightsync.dtypes import itemsize
from weightsync.errors import InputError
from weightsync.families.config import ModelConfig
from weightsync.families.decoder import (
    Declaration,
    Experts,
    attention,
    latent_attention,
    mixture,
    mlp,
)
from weightsync.families.model import Model

WIRE_DTYPES = ("bf16", "fp8")
_Layer = Callable[[Declaration, ModelConfig, int], None]


def _dense(out: Declaration, config: ModelConfig, layer: int) -> None:
    width = config.size("intermediate_size")
    bias = config.flag("mlp_bias")
    sizes = (config.size("hidden_size"), width)
    mlp(out, f"model.layers.{layer}.mlp", layer, sizes, bias=bias)


def _llama(out: Declaration, config: ModelConfig, layer: int) -> None:
    bias = config.flag("attention_bias")
    attention(out, config, layer, qkv_bias=bias, o_bias=bias, qk_norm=False)
    _dense(out, config, layer)


def _qwen2(out: Declaration, config: ModelConfig, layer: int) -> None:
    # the engine's Qwen2 does not read head_dim
    head_dim = config.size("hidden_size") // config.size("num_attention_heads")
    attention(out, config, layer, qkv_bias=True, o_bias=False, qk_norm=False, head_dim=head_dim)
    _dense(out, config, layer)


def _qwen3(out: Declaration, config: ModelConfig, layer: int) -> None:
    bias = config.flag("attention_bias")
    attention(out, config, layer, qkv_bias=bias, o_bias=False, qk_norm=True)
    _dense(out, config, layer)


def _qwen3_moe(out: Declaration, config: ModelConfig, layer: int) -> None:
    bias = config.flag("attention_bias")
    attention(out, config, layer, qkv_bias=bias, o_bias=False, qk_norm=True)
    dense_only = layer in (config.values.get("mlp_only_layers") or ())
    if dense_only or (layer + 1) % config.size("decoder_sparse_step", 1):
        _dense(out, config, layer)
    else:
        count = config.size("num_experts")
        experts = Experts("mlp", count, config.size("moe_intermediate_size"))
        mixture(out, layer, config.size("hidden_size"), experts)


def _mixtral(out: Declaration, config: ModelConfig, layer: int) -> None:
    attention(out, config, layer, qkv_bias=False, o_bias=False, qk_norm=False)
    count, width = config.size("num_local_experts"), config.size("intermediate_size")
    experts = Experts("block_sparse_moe", count, width, ("w1", "w3", "w2"))
    mixture(out, layer, config.size("hidden_size"), experts)


def _deep_mlp(
    out: Declaration,
    config: ModelConfig,
    layer: int,
    *,
    score_bias: bool,
    gate_dtype: str = "",
    sequence: bool = False,
) -> None:
    """Dense in the first layers, then routed and shared experts."""
    sparse = layer >= config.count("first_k_dense_replace")
    if not sparse or layer % config.size("moe_layer_freq", 1):
        _dense(out, config, layer)
        return
    width = config.size("moe_intermediate_size")
    experts = Experts(
        "mlp",
        config.size("n_routed_experts"),
        width,
        score_bias=score_bias,
        shared_width=config.count("n_shared_experts") * width,
        gate_dtype=gate_dtype,
        sequence=sequence,
    )
    mixture(out, layer, config.size("hidden_size"), experts)


def _deepseek(out: Declaration, config: ModelConfig, layer: int) -> None:
    latent_attention(out, config, layer)
    score_bias = config.text("topk_method", "") == "noaux_tc"
    _deep_mlp(out, config, layer, score_bias=score_bias, sequence=True)


def _glm4_moe(out: Declaration, config: ModelConfig, layer: int) -> None:
    bias, norm = config.flag("attention_bias"), config.flag("use_qk_norm")
    attention(out, config, layer, qkv_bias=bias, o_bias=False, qk_norm=norm)
    _deep_mlp(out, config, layer, score_bias=True, gate_dtype="float32")


#: families whose engine has embedding, final norm and output projection in every pipeline stage
_ENDS_EVERYWHERE = frozenset({"qwen3_moe", "mixtral"})

#: ``model_type`` → what a layer is made of
FAMILIES: dict[str, _Layer] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "kimi_k2": _deepseek,
    "glm4_moe": _glm4_moe,
}


def declare(config: ModelConfig, *, wire_dtype: str = "bf16") -> Model:
    """The checkpoint and kernel tensors of a model.

    Multi-token prediction layers behind ``num_hidden_layers`` are left out: the engine's main
    model has none.

    Args:
        config: A Hugging Face config.
        wire_dtype: ``bf16``: what the config says, or bfloat16. ``fp8``: linear layers as e4m3
            blocks of 128 × 128 with a float32 scale each; all else as under ``bf16``.

    Raises:
        InputError: An unknown family or dtype, or a value that is missing.
    """
    if wire_dtype not in WIRE_DTYPES:
        raise InputError(
            f"unknown wire dtype {wire_dtype!r}", hint=f"use one of {', '.join(WIRE_DTYPES)}"
        )
    family = config.text("model_type", "")
    layer_of = FAMILIES.get(family)
    if layer_of is None:
        near = difflib.get_close_matches(family, FAMILIES)
        raise InputError(
            f"{config.where}: no layout is declared for model_type {family!r}"
            + (f"; did you mean {near[0]!r}?" if near else ""),
            hint=f"declared: {', '.join(FAMILIES)}; any other model needs its engine",
        )
    if config.values.get("index_topk") is not None:
        raise InputError(
            f"{config.where}: sparse attention with an indexer (index_topk) is not declared",
            hint="plan with the engine's own layout instead",
        )
    dtype = config.text("dtype", config.text("torch_dtype", "bfloat16"))
    itemsize(dtype)
    out = Declaration(dtype, wire_dtype == "fp8")
    hidden, vocab = config.size("hidden_size"), config.size("vocab_size")
    layers, tied = config.size("num_hidden_layers"), config.flag("tie_word_embeddings")
    out.vocabulary("first", "model.embed_tokens.weight", vocab, hidden)
    for layer in range(layers):
        layer_of(out, config, layer)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            out.plain(layer, f"model.layers.{layer}.{norm}.weight", (hidden,))
    out.plain("last", "model.norm.weight", (hidden,))
    if not tied:
        out.vocabulary("last", "lm_head.weight", vocab, hidden)
    return Model(family, layers, tied, family in _ENDS_EVERYWHERE, tuple(out.kernels))
