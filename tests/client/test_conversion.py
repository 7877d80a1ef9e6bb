"""Conversions against what transformers itself saves, and what they refuse."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_world import mesh_of, shard
from reference import plain_regions
from safetensors.torch import load_file
from test_held import Job
from test_push import arrived
from torch import nn
from torch.distributed.tensor import Shard

from weightsync.errors import InputError, ManifestError
from weightsync_client import (
    Concat,
    ConversionSpec,
    LocalShard,
    ModuleSource,
    Rearrange,
    Rule,
    Split,
    Stack,
    StateDictSource,
    Unstack,
    register_conversion,
)
from weightsync_client import conversion as registry
from weightsync_client.source import as_source

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 24, "head_dim": 8,
    "num_experts_per_tok": 2,
}  # fmt: skip


def _config(family: str) -> Any:
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


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(registry, "_by_architecture", {})


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    """A family, the state dict of a tiny model of it, and the checkpoint that it saves."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        _config(request.param), dtype=torch.bfloat16
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
    if family == "mixtral":
        pytest.skip("the same with other names")
    at = "{*at}.experts.{e}"
    spec = ConversionSpec(
        "fuse",
        [
            Rule(
                (f"{at}.gate_proj.weight", f"{at}.up_proj.weight"),
                "{*at}.experts.gate_up_proj",
                [Concat(0), Stack("e", size=size)],
            ),
            Rule(f"{at}.down_proj.weight", "{*at}.experts.down_proj", Stack("e", size=size)),
        ],
    )
    assert_same(values(as_source(checkpoint, spec)), tensors)

    def build(mesh):  # each rank has the modules of its experts, and of the rest all
        mine = {f".experts.{e}." for e in range(6) if e % 2 == mesh.get_rank()}
        here = {
            n: t
            for n, t in checkpoint.items()
            if ".mlp.experts." not in n or any(one in n for one in mine)
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


# ------------------------------------------------------------------ docs/trainers.md

DOCS = Path(__file__).parents[2] / "docs" / "trainers.md"
#: one by one the names that torchtitan has for those of a Qwen3-MoE checkpoint
TITAN_NAMES = {
    "model.embed_tokens.": "tok_embeddings.", "model.norm.": "norm.", "lm_head.": "output.",
    "model.layers.": "layers.", "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm", "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate.": "moe.router.gate.",
}  # fmt: skip


def test_the_example_of_the_docs_makes_the_checkpoint_of_a_torchtitan_trainer(
    own_registry, tmp_path
) -> None:
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(_config("qwen3_moe"))
    model.save_pretrained(tmp_path)
    checkpoint = load_file(tmp_path / "model.safetensors")
    experts: dict[str, dict[int, torch.Tensor]] = {}
    tensors = {}
    for name, t in checkpoint.items():
        if found := re.fullmatch(r"model\.(.*)\.mlp\.experts\.(\d+)\.(\w+)\.weight", name):
            which = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}[found[3]]
            experts.setdefault(f"{found[1]}.moe.experts.{which}", {})[int(found[2])] = t
            continue
        for theirs, titans in TITAN_NAMES.items():
            name = name.replace(theirs, titans)  # noqa: PLW2901
        tensors[name] = t
    tensors |= {n: torch.stack([of[e] for e in range(6)]) for n, of in experts.items()}

    (block,) = re.findall(
        r"```python\n(from weightsync_client import Conv.*?)```", DOCS.read_text(), re.DOTALL
    )
    exec(block, {})  # noqa: S102
    assert_same(values(as_source(tensors, "titan_moe")), checkpoint)

    class TitanMoE(nn.Module):
        def state_dict(self, *_, **__):
            return tensors

    assert_same(values(as_source(TitanMoE())), checkpoint)

    def build(mesh):
        return as_source({n: shard(t, mesh, Shard(0)) for n, t in tensors.items()}, "titan_moe")

    Job(build, (4,)).assert_equals(checkpoint)


# ------------------------------------------------------------------ which conversion is used


class MyMoe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, 3))


def test_a_registered_architecture_is_converted_without_being_asked_for(own_registry) -> None:
    spec = ConversionSpec("my_moe", [Rule("w", "model.w", Rearrange("i o -> o i"))])
    register_conversion(spec, architectures=["MyMoe"])
    register_conversion(spec, architectures=["MyMoe"])  # a notebook's cell, run again

    class Derived(MyMoe): ...

    for model in (MyMoe(), Derived(), torch.compile(MyMoe())):
        assert [(t.name, t.shape) for t in as_source(model).manifest()] == [("model.w", (3, 2))]
    assert [t.name for t in as_source(MyMoe(), None).manifest()] == ["w"]
    assert [t.name for t in as_source(MyMoe().state_dict()).manifest()] == ["w"]
    assert [t.name for t in as_source(MyMoe().state_dict(), "my_moe").manifest()] == ["model.w"]
    with pytest.raises(InputError, match="MyMoe has the conversion 'my_moe'"):
        register_conversion(ConversionSpec("b", [Rule("w", "x")]), architectures=["MyMoe"])
    with pytest.raises(InputError, match="another conversion is registered as 'my_moe'"):
        register_conversion(ConversionSpec("my_moe", [Rule("w", "x")]))


def test_a_source_of_ones_own_is_converted_where_that_is_asked_for() -> None:
    spec = ConversionSpec("mine", [Rule("w", "v")])
    source = StateDictSource({"w": torch.ones(2)}, dtype=torch.bfloat16)
    assert as_source(source) is source
    assert [(t.name, t.dtype) for t in as_source(source, spec).manifest()] == [("v", "bfloat16")]


def test_transformers_models_are_converted_by_their_own_library() -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(_config("qwen3_moe"))
    assert isinstance(as_source(model), ModuleSource)
    assert_same(values(as_source(model, "qwen3_moe")), values(as_source(model)))


def test_an_unknown_name_tells_the_nearest() -> None:
    with pytest.raises(InputError, match=r"as 'qwen3moe' \(nearest: qwen3_moe"):
        as_source({}, "qwen3moe")
    with pytest.raises(InputError, match="a int is no conversion"):
        as_source({}, 3)


# ------------------------------------------------------------------ what is refused

W = torch.ones(12, 4)


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ([Rule("w", ("a", "b", "c"), Split(0, (4, 4, 3)))], r"add up to 11; 'w' .*whole here"),
        ([Rule("w", ("a", "b"), Split(0, ratio=(4, 1)))], "12 elements, which do not split into 5"),
        ([Rule("w", ("a", "b"), Split(2))], r"no dim 2 in \[12, 4\]"),
        ([Rule("w", ("a", "b", "c"), Split(0, (6, 6)))], "leaves 2 tensors for 3 names"),
        ([Rule("w", ("a", "b"))], "leaves 1 tensors for 2 names"),
        ([Rule(("w", "v"), "a", Concat(0))], "there is no 'v' that goes with it"),
        ([Rule(("w", "u"), "a", Concat(0))], r"float32 \[12, 4\] and float32 \[3, 3\] do not go"),
        ([Rule("w", "a", Rearrange("(h d) i -> h d i", {"h": 5}))], r"12 .* is not \(h=5, d=\?\)"),
        ([Rule("w", "a", Rearrange("a b c -> c b a"))], "it has 2 dims"),
        ([Rule("{n}", "a.b", Stack("n"))], "which is no number"),
        ([Rule("w", "u")], "makes 'u' twice: by rule w → u, and by its own name"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_rule_tensor_and_shards(rules, says) -> None:
    tensors = {"w": W, "u": torch.ones(3, 3)}
    with pytest.raises((InputError, ManifestError), match=says):
        as_source(tensors, ConversionSpec("mine", rules))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Rule("w.{i}", "a"), r"'a' has the placeholders \[\], \['i'\] are needed"),
        (lambda: Rule("w", "a.{i}"), "needed"),
        (lambda: Rule(("w.{i}", "v"), "a.{i}", Concat(0)), "'v' has the placeholders"),
        (lambda: Rule("w", "a", Stack("e")), r"Stack\('e'\) has no \{e\}"),
        (lambda: Rule("w{", "a"), "is no name"),
        (lambda: Rule("w", "a", "transpose"), "is no operation"),
        (lambda: Rule("w", ()), "no names"),
        (lambda: Split(0, (1, 2), (1, 2)), "sizes and a ratio"),
        (lambda: Split(0, (0, 2)), "parts have elements"),
        (lambda: Rearrange("a b -> b"), "one side"),
        (lambda: Rearrange("a b"), "is no pattern"),
        (lambda: Rearrange("(a b) -> a b"), "sizes of a, b are not known"),
        (lambda: Rearrange("a b -> b a", {"c": 1}), "no dim 'c'"),
        (lambda: ConversionSpec("", []), "not a conversion"),
        (lambda: ConversionSpec("x", [], rest="ignore"), "rest is 'ignore'"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused_when_it_is_written(make, says) -> None:
    with pytest.raises(InputError, match=says):
        make()


def test_a_tensor_that_no_rule_takes_is_kept_dropped_or_refused() -> None:
    tensors = {"w": W, "x": W.clone()}

    def spec(rest):
        return ConversionSpec("mine", [Rule("w", "a")], rest=rest)

    assert [t.name for t in as_source(tensors, spec("keep")).manifest()] == ["a", "x"]
    assert [t.name for t in as_source(tensors, spec("drop")).manifest()] == ["a"]
    with pytest.raises(InputError, match="conversion 'mine' has no rule for x"):
        as_source(tensors, spec("refuse"))


def test_a_shard_that_would_be_too_many_boxes_is_refused() -> None:
    spec = ConversionSpec("mine", [Rule("w", "a", Rearrange("a b -> (a b)"))])
    whole = torch.zeros(5000, 4)
    assert len(as_source({"w": whole}, spec).holdings()["a"]) == 1
    with mesh_of(0, (2,)) as mesh:
        cut = {"w": shard(whole, mesh, Shard(1))}
        says = (
            r"more than 4096 boxes .*'w' has shape \[5000, 4\], of it here: \[0, 0\]..\[5000, 2\]"
        )
        with pytest.raises(InputError, match=rf"{says}.*shard another dim"):
            as_source(cut, spec)


def test_a_rule_may_be_for_another_ranks_tensors_but_not_for_nobodys() -> None:
    spec = ConversionSpec("mine", [Rule("stage.{i}.w", "model.{i}.w"), Rule("head", "lm_head")])

    def build(mesh):
        rank = mesh.get_rank()
        return as_source({f"stage.{rank}.w": W} | ({"head": W} if rank else {}), spec)

    Job(build, (2,)).assert_equals({"model.0.w": W, "model.1.w": W, "lm_head": W}, copies=None)
    typo = ConversionSpec("mine", [Rule("layers.{i}.attention.wqq", "q.{i}")])
    says = (
        r"no tensor of any rank .* rule layers\.\{i\}\.attention\.wqq.*nearest names: layers\.7\."
    )
    with pytest.raises(InputError, match=says):
        Job(lambda _: as_source({"layers.7.attention.wq": W, "other": W}, typo), (2,))


# ------------------------------------------------------------------ in a push

TITAN = ConversionSpec(
    "titan",
    [
        Rule("tok.weight", "model.embed_tokens.weight"),
        Rule("layers.{i}.wq.weight", "model.layers.{i}.self_attn.q_proj.weight"),
        Rule("layers.{i}.experts.w1", "model.layers.{i}.mlp.experts.{e}.up.weight", Unstack("e")),
    ],
)


def titan(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "tok.weight": torch.randn(8, 4),
        "layers.0.wq.weight": torch.randn(4, 4),
        "layers.0.experts.w1": torch.randn(3, 6, 4),
    }


def test_a_publisher_converts_in_every_push(agent, make_publisher) -> None:
    publisher = make_publisher(agent, conversion=TITAN)
    for seed in (1, 2):
        publisher.push(titan(seed))
        assert arrived(agent, values(as_source(titan(seed), TITAN)))
    assert agent.calls.count("/init_transfer") == 1
    assert (
        agent.workers[0]
        .tensor("model.layers.0.mlp.experts.2.up.weight", torch.float32, (6, 4))
        .equal(titan(2)["layers.0.experts.w1"][2])
    )


def test_a_name_that_the_engine_does_not_want_is_told_with_its_rule(
    make_agent, make_publisher
) -> None:
    def wants(manifest):
        return [r for r in plain_regions(manifest) if "q_prj" not in r.name]

    tok, _, experts = TITAN.rules
    wq = Rule("layers.{i}.wq.weight", "model.layers.{i}.self_attn.q_prj.weight")
    typo = replace(TITAN, rules=[tok, wq, experts])
    agent = make_agent(regions=wants)
    says = r"unknown to the engine: .*q_prj.*is made by rule layers\.\{i\}\.wq"
    with pytest.raises(ManifestError, match=says):
        make_publisher(agent, conversion=typo).push(titan(1))
    assert "/pause" not in agent.calls


def test_a_wrong_conversion_is_refused_before_anything_is_asked_of_an_engine(
    agent, make_publisher
) -> None:
    with pytest.raises(InputError, match="no conversion is registered as 'titn'"):
        make_publisher(agent, conversion="titn")
    with pytest.raises(InputError, match=r"no tensor of any rank.*layers\.\{i\}\.wq"):
        make_publisher(agent, conversion=TITAN).push({"tok.weight": torch.ones(2)})
    assert set(agent.calls) <= {"/status"}
