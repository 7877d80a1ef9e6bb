"""Conversions against what transformers itself saves, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_world import shard
from safetensors.torch import load_file
from test_held import Job
from test_quantized import assembled
from torch.distributed.tensor import Shard

from weightsync.errors import InputError
from weightsync_client import (
    Concat,
    ConversionSpec,
    LocalShard,
    QuantizationSpec,
    Rearrange,
    Rule,
    Split,
    Stack,
    StateDictSource,
)
from weightsync_client.borders import merge
from weightsync_client.quantized import QuantizedSource
from weightsync_client.source import as_source

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 24, "head_dim": 8,
    "num_experts_per_tok": 2,
}  # fmt: skip


def config_of(family: str) -> Any:
    if family == "qwen3_moe":
        return transformers.Qwen3MoeConfig(**SMALL, num_experts=6)
    if family == "mixtral":
        return transformers.MixtralConfig(**SMALL, num_local_experts=6)
    routed = {"n_routed_experts": 6, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    if family == "glm4_moe":
        return transformers.Glm4MoeConfig(**SMALL, **routed)
    return transformers.DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4}, **routed, q_lora_rank=16, kv_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip


FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe")


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    """A family, the state dict of a tiny model of it, and the checkpoint that it saves."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config_of(request.param), dtype=torch.bfloat16
    )
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    checkpoint = load_file(folder / "model.safetensors")
    return request.param, {n: t.clone() for n, t in model.state_dict().items()}, checkpoint


def values(source) -> dict[str, torch.Tensor]:
    """The tensors of a source that is not sharded, put together from its boxes."""
    out = {}
    for spec in source.manifest():
        whole = torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype))
        times = torch.zeros(spec.shape, dtype=torch.int64)
        for k, box in enumerate(source.holdings()[spec.name]):
            at = tuple(slice(a, b) for a, b in zip(box.lo, box.hi, strict=True))
            whole[at] = source.local(spec.name, k)
            times[at] += 1
        assert (times == 1).all(), spec.name
        out[spec.name] = whole
    return out


def assert_same(made: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert made.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (made[name].dtype, made[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(made[name], tensor), name


# ------------------------------------------------------------------ against transformers


def test_a_fused_state_dict_becomes_what_transformers_saves(saved) -> None:
    family, tensors, checkpoint = saved
    source = as_source(tensors, family)
    assert any(".experts.5." in name for name in checkpoint)
    assert_same(values(source), checkpoint)
    starts = {t.untyped_storage().data_ptr() for t in tensors.values()}
    for name in checkpoint:
        assert source.local(name, 0).untyped_storage().data_ptr() in starts, "a copy was made"


def test_experts_that_are_modules_of_their_own_pass_through(saved) -> None:
    family, _, checkpoint = saved
    assert_same(values(as_source(checkpoint, family)), checkpoint)


@pytest.mark.parametrize("placements", [(Shard(0), Shard(1)), (Shard(1), Shard(2)), (Shard(2),)])
def test_shards_of_fused_experts_become_what_transformers_saves(saved, placements) -> None:
    """Expert parallel over FSDP; FSDP across the border of gate and up; the hidden dim."""
    family, tensors, checkpoint = saved

    def build(mesh):
        cut = {
            name: shard(t, mesh, *(placements if t.ndim == 3 else [Shard(0)] * mesh.ndim))
            for name, t in tensors.items()
        }
        return as_source(cut, family)

    Job(build, (2, 2)[: len(placements)]).assert_equals(checkpoint)


def test_local_shards_of_expert_parallel_ranks_need_no_dtensor() -> None:
    fused, down = torch.randn(8, 12, 4), torch.randn(8, 4, 6)

    def build(mesh):
        lo = 4 * mesh.get_rank()
        tensors = {"gate_up_proj": fused, "down_proj": down}
        return as_source(
            {
                f"a.mlp.experts.{n}": LocalShard(t[lo : lo + 4], tuple(t.shape), (lo, 0, 0))
                for n, t in tensors.items()
            },
            "qwen3_moe",
        )

    wanted = {}
    for e in range(8):
        at = f"a.mlp.experts.{e}"
        wanted[f"{at}.gate_proj.weight"], wanted[f"{at}.up_proj.weight"] = fused[e].chunk(2)
        wanted[f"{at}.down_proj.weight"] = down[e]
    Job(build, (2,)).assert_equals(wanted)


@pytest.mark.parametrize("size", [6, None])
def test_one_tensor_an_expert_becomes_the_fused_parameter(saved, size) -> None:
    """The way back: a trainer with a module an expert, an engine that wants them fused."""
    family, tensors, checkpoint = saved
    mlp, (gate, up, down) = "mlp", ("gate_proj", "up_proj", "down_proj")
    if family == "mixtral":
        mlp, (gate, up, down) = "block_sparse_moe", ("w1", "w3", "w2")
    at, fused = f"{{*at}}.{mlp}.experts.{{e}}", "{*at}.mlp.experts"
    spec = ConversionSpec(
        "fuse",
        [
            Rule(
                (f"{at}.{gate}.weight", f"{at}.{up}.weight"),
                f"{fused}.gate_up_proj",
                [Concat(0), Stack("e", size=size)],
            ),
            Rule(f"{at}.{down}.weight", f"{fused}.down_proj", Stack("e", size=size)),
            Rule(f"{{*at}}.{mlp}.{{*rest}}", "{*at}.mlp.{*rest}"),
        ],
    )
    assert_same(values(as_source(checkpoint, spec)), tensors)

    def build(mesh):  # each rank has the modules of its experts, and of the rest all
        mine = {f".experts.{e}." for e in range(6) if e % 2 == mesh.get_rank()}
        here = {
            n: t
            for n, t in checkpoint.items()
            if ".experts." not in n or any(one in n for one in mine)
        }
        return as_source(here, spec)

    if size is None:
        with pytest.raises(InputError, match=r"there are 3 of them here, .*size="):
            Job(build, (2,))
    else:
        Job(build, (2,)).assert_equals(tensors, copies=None)


# ------------------------------------------------------------------ other layouts


def _rope(whole: torch.Tensor, heads: int) -> torch.Tensor:
    rest = whole.shape[1:]
    return whole.view(heads, -1, 2, *rest).transpose(1, 2).reshape(whole.shape)


@pytest.mark.parametrize("placements", [(Shard(0),), (Shard(1),), (Shard(0), Shard(0))])
def test_interleaved_rotary_rows_and_grouped_qkv_are_boxes_however_sharded(placements) -> None:
    """Rows 2·4·6: heads and groups are cut in the middle, by 5 ranks and by 2×3."""
    torch.manual_seed(0)
    wq, qkv = torch.randn(48, 5), torch.randn(2 * (3 + 1 + 1) * 6, 5)
    spec = ConversionSpec(
        "mine",
        [
            Rule("wq", "q", Rearrange("(h pair two) i -> (h two pair) i", {"h": 4, "two": 2})),
            Rule(
                "qkv",
                ("gq", "gk", "gv"),
                [
                    Rearrange("(group part d) i -> group part d i", {"group": 2, "d": 6}),
                    Split(1, sizes=(3, 1, 1)),
                    Rearrange("group part d i -> (group part d) i"),
                ],
            ),
            Rule("t", "t.t", Rearrange("a b -> b a")),
        ],
    )  # fmt: skip
    parts = qkv.view(2, 5, 6, 5).split((3, 1, 1), dim=1)
    wanted = {"q": _rope(wq, 4), "t.t": wq.t().contiguous()} | {
        n: p.reshape(-1, 5) for n, p in zip(("gq", "gk", "gv"), parts, strict=True)
    }
    tensors = {"wq": wq, "qkv": qkv, "t": wq}
    assert_same(values(as_source(tensors, spec)), wanted)
    shape = (5,) if len(placements) == 1 else (2, 3)

    def build(mesh):
        return as_source({n: shard(t, mesh, *placements) for n, t in tensors.items()}, spec)

    Job(build, shape).assert_equals(wanted)


def test_dtypes_drops_aliases_and_tied_names() -> None:
    embed = torch.randn(6, 4)
    spec = ConversionSpec(
        "mine",
        [
            Rule("tok.weight", "model.embed_tokens.weight"),
            Rule("out.weight", "model.out.weight"),
            Rule("layers.{i}.bias", "model.layers.{i}.bias", dtype=torch.float32),
            Rule("freqs", None),
        ],
        rest="refuse",
        aliases={"lm_head.weight": "model.embed_tokens.weight"},
        dtype=torch.bfloat16,
    )
    tensors = {
        "tok.weight": embed, "out.weight": embed, "layers.3.bias": torch.ones(2),
        "freqs": torch.ones(3),
    }  # fmt: skip
    made = {t.name: t for t in as_source(tensors, spec).manifest()}
    assert {n: (t.dtype, t.alias_of) for n, t in made.items()} == {
        "model.embed_tokens.weight": ("bfloat16", ""),
        "model.out.weight": ("bfloat16", "model.embed_tokens.weight"),
        "model.layers.3.bias": ("float32", ""),
        "lm_head.weight": ("bfloat16", "model.embed_tokens.weight"),
    }


def test_the_first_rule_that_takes_a_name_has_it() -> None:
    spec = ConversionSpec("mine", [Rule("a.{n}", "first.{n}"), Rule("{*n}", "x.{n}")])
    source = as_source({"b.c": torch.ones(1), "a.b": torch.ones(1)}, spec)
    assert [t.name for t in source.manifest()] == ["first.b", "x.b.c"]


def test_fp8_blocks_are_made_of_what_the_conversion_yields(saved) -> None:
    """Fused and sharded at the trainer: the bytes are those of the checkpoint's own matrices."""
    family, tensors, checkpoint = saved
    spec = QuantizationSpec()
    halves = [
        {
            n: LocalShard(part, tuple(t.shape), (rank * len(part), *[0] * (t.ndim - 1)))
            for n, t in tensors.items()
            if (part := t.chunk(2)[rank]).numel()
        }
        for rank in range(2)
    ]
    sources = [QuantizedSource(as_source(parts, family), spec) for parts in halves]
    whole = [QuantizedSource(StateDictSource(checkpoint), spec)]
    for ranks in (sources, whole):
        merged = merge([source.findings() for source in ranks])
        for source in ranks:
            source.learn(merged)
    names = [t.name for t in whole[0].manifest() if len(t.shape) == 2]
    assert sum(name.endswith("_scale_inv") for name in names) > 6
    for name in names:
        assert torch.equal(
            assembled(sources, name).view(torch.uint8), assembled(whole, name).view(torch.uint8)
        ), name
