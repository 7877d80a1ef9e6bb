"""Random weights for any config: they are valid, repeatable, and their change shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from tests.support.models import KINDS, config_of
from weightsync.errors import InputError
from weightsync_client.demo.model import describe_model, draw_weights, new_model

TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def deepseek_config():
    return transformers.DeepseekV3Config(
        **TINY, moe_intermediate_size=32, n_routed_experts=8, n_group=1, topk_group=1,
        first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16,
        qk_nope_head_dim=16, v_head_dim=16, num_experts_per_tok=2,
    )  # fmt: skip


def logprobs(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([[5, 6, 7, 8]])).logits[0, -1].float().log_softmax(-1)


def saved_config(config, folder: Path) -> Path:
    path = folder / "config.json"
    config.to_json_file(path)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_moves_the_logprobs(kind, tmp_path):
    model = new_model(saved_config(config_of(kind), tmp_path))
    draw_weights(model, seed=0)
    before = logprobs(model)
    draw_weights(model, seed=1)
    moved = (logprobs(model) - before).abs()
    assert moved.isfinite().all()
    assert moved.mean() > 0.2


@pytest.mark.parametrize(
    "config",
    [
        transformers.GPTNeoXConfig(
            vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4,
        ),
        transformers.Gemma3TextConfig(**TINY, head_dim=16),
        transformers.MixtralConfig(**TINY, num_local_experts=4),
        deepseek_config(),
        transformers.MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2),
    ],
    ids=lambda c: c.model_type,
)  # fmt: skip
def test_any_causal_config_gives_finite_logprobs_that_move(config, tmp_path):
    model = new_model(saved_config(config, tmp_path))
    draw_weights(model, seed=0)
    before = logprobs(model)
    draw_weights(model, seed=1)
    assert before.isfinite().all()
    assert (logprobs(model) - before).abs().max() > 0.1


def test_the_same_seed_draws_the_same_weights():
    one, other = new_model(None), new_model(None)
    draw_weights(one, seed=3)
    draw_weights(other, seed=3)
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name


def test_every_weight_changes_with_the_seed_and_routing_biases_too(tmp_path):
    model = new_model(saved_config(deepseek_config(), tmp_path))
    draw_weights(model, seed=0)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    draw_weights(model, seed=1)
    after = model.state_dict()
    assert any(name.endswith("e_score_correction_bias") for name in after)
    assert [name for name in after if torch.equal(before[name], after[name])] == []


def test_matrices_scale_with_fan_in_and_norms_stay_around_one():
    model = new_model(None)
    draw_weights(model, seed=0)
    weights = dict(model.named_parameters())
    assert weights["model.layers.0.mlp.up_proj.weight"].float().std() == pytest.approx(
        0.08, rel=0.05
    )
    assert weights["model.layers.0.mlp.down_proj.weight"].float().std() == pytest.approx(
        0.08 / 2**0.5, rel=0.05
    )
    norm = weights["model.norm.weight"]
    assert 0.5 <= norm.min() < norm.max() <= 1.5


def test_weights_are_bfloat16_whatever_the_config_says(tmp_path):
    config = transformers.LlamaConfig(**TINY).to_dict()
    config |= {"dtype": "float32", "quantization_config": {"quant_method": "fp8"}}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    model = new_model(path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["dtype"] == "bfloat16"
    assert "quantization_config" not in saved


def test_description_names_what_a_prompt_may_hold():
    facts = describe_model(new_model(None))
    assert facts["name"] == "Qwen3ForCausalLM"
    assert facts["vocab_size"] == facts["max_positions"] == 512
    assert facts["nbytes"] == 2 * facts["parameters"]


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "no-such-model"},
        {"model_type": "vit"},
        {"model_type": "qwen3", "hidden_size": "many"},
        {"model_type": "qwen3", "hidden_size": 64, "num_attention_heads": 0},
    ],
    ids=["unknown", "no text model", "wrong type", "impossible"],
)
def test_config_that_no_model_can_be_made_from_is_a_clear_error(config, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match="no causal language model") as caught:
        new_model(path)
    assert str(path) in caught.value.message
    assert caught.value.hint
