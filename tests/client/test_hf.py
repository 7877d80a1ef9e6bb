"""A transformers model is published under the names and shapes of the checkpoint that it saves."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.support.models import KINDS, new_model
from weightsync_client.hf import HfConversion, checkpoint_tensors
from weightsync_client.source import ModuleSource

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def _families():
    return {
        "mixtral": transformers.MixtralConfig(**SMALL, num_local_experts=4),
        "deepseek_v3": transformers.DeepseekV3Config(
            **{**SMALL, "num_key_value_heads": 4},
            moe_intermediate_size=32, n_routed_experts=8, n_group=1, topk_group=1,
            first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16,
            qk_nope_head_dim=16, v_head_dim=16, num_experts_per_tok=2,
        ),
        "gpt_oss": transformers.GptOssConfig(**SMALL, num_local_experts=4, head_dim=16),
    }  # fmt: skip


def _made(model, tensors=None):
    """The checkpoint tensors of a model that is not sharded."""
    held = checkpoint_tensors(model, model.state_dict() if tensors is None else tensors)
    return {name: values for name, part in held.items() for _, values in part.pieces}


def _saved(model, folder):
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_source_equals_the_saved_checkpoint(kind, tmp_path):
    model = new_model(kind, seed=1)
    source = ModuleSource(model)
    saved = _saved(model, tmp_path)
    published = {t.name: t for t in source.manifest()}
    extra = published.keys() - saved.keys()
    assert saved.keys() <= published.keys()
    assert all(published[name].alias_of in saved for name in extra)
    assert all(torch.equal(source.local(n, 0), t) for n, t in saved.items())


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_conversion_of_other_families_equals_what_they_save(family, tmp_path):
    model = transformers.AutoModelForCausalLM.from_config(_families()[family])
    made = _made(model)
    saved = _saved(model, tmp_path)
    assert made.keys() == saved.keys()
    assert all(made[n].shape == t.shape and torch.equal(made[n], t) for n, t in saved.items())


def test_experts_are_views_of_the_fused_parameter_and_see_its_next_values():
    model = new_model("qwen3_moe", seed=1)
    tensors = model.state_dict()
    conversion = HfConversion(model, tensors)
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    ((_, view),) = conversion.apply(model, tensors)[name].pieces
    fused = model.model.layers[0].mlp.experts.gate_up_proj
    assert view.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()
    with torch.no_grad():
        fused.add_(1)
    assert torch.equal(view, fused[3, fused.shape[1] // 2 :])


def test_a_parameter_of_another_form_is_converted_again():
    model = new_model("qwen3_moe", seed=1)
    first = _made(model)
    with torch.no_grad():
        for layer in model.model.layers:
            old = layer.mlp.experts.down_proj
            strided = old.detach().transpose(1, 2).contiguous().transpose(1, 2)
            layer.mlp.experts.down_proj = nn.Parameter(strided)
    second = _made(model)
    name = "model.layers.1.mlp.experts.5.down_proj.weight"
    assert not second[name].is_contiguous()
    assert torch.equal(first[name], second[name])


def test_a_conversion_that_computes_is_run_anew_each_time(monkeypatch):
    import transformers.core_model_loading as loading

    def double(model, tensors):
        return {name: t * 2 for name, t in tensors.items()}

    monkeypatch.setattr(loading, "revert_weight_conversion", double)
    model = new_model("llama", seed=1)
    made = _made(model)
    weight = model.model.norm.weight
    assert torch.equal(made["model.norm.weight"], weight.detach() * 2)
    with torch.no_grad():
        weight.add_(1)
    again = _made(model)
    assert torch.equal(again["model.norm.weight"], weight.detach() * 2)


def test_a_plain_module_keeps_its_own_names():
    model = nn.Linear(2, 3)
    tensors = model.state_dict()
    assert _made(model, tensors).keys() == tensors.keys()
