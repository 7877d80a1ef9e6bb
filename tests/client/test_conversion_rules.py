"""Which conversion is used, what it refuses, and pushes through one."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_world import mesh_of, shard
from jobs import same_report, sharded
from reference import plain_regions
from safetensors.torch import load_file
from test_conversion import assert_same, config_of, values
from test_held import Job
from test_push import arrived
from torch import nn
from torch.distributed.tensor import Shard

from weightsync.errors import InputError, ManifestError
from weightsync_client import (
    Concat,
    ConversionSpec,
    ModuleSource,
    Rearrange,
    Rule,
    Split,
    Stack,
    StateDictSource,
    Unstack,
    register_conversion,
)
from weightsync_client import conversions as registry
from weightsync_client.source import as_source

transformers = pytest.importorskip("transformers")


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(registry, "_by_architecture", {})


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
    model = transformers.AutoModelForCausalLM.from_config(config_of("qwen3_moe"))
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
    model = transformers.AutoModelForCausalLM.from_config(config_of("qwen3_moe"))
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
        (lambda: Rule("w.{i}", "a.{i}", Unstack("i")), "there before Unstack"),
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
    typo = ConversionSpec("mine", [Rule("w", "a"), Rule("xx", "b")], rest="refuse")
    with pytest.raises(InputError, match=r"no rule for x .*nothing here is for rule xx → b"):
        as_source(tensors, typo)


def test_a_name_twice_is_refused_before_it_is_converted() -> None:
    with pytest.raises(ManifestError, match="the trainer has 'w' twice"):
        as_source([("w", W), ("w", W)], ConversionSpec("mine", [Rule("w", "a")]))


def test_what_is_left_out_need_not_be_a_tensor() -> None:
    """Transformer Engine's modules have extra state in their state dicts: bytes."""
    state = {"w": W, "w._extra_state": b"fp8", "v._extra_state": None}
    drop = Rule("{*at}._extra_state", None)
    for spec in (
        ConversionSpec("mine", [Rule("w", "a"), drop], rest="refuse"),
        ConversionSpec("mine", [Rule("w", "a")], rest="drop"),
    ):
        source = as_source(state, spec)
        assert [t.name for t in source.manifest()] == ["a"]
        assert not source.unmatched
    with pytest.raises(InputError, match=r"'w\._extra_state' is a bytes"):
        as_source(state, ConversionSpec("mine", [Rule("w", "a")]))


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


ROTARY = Rule("wq", "q", Rearrange("(h pair two) i -> (h two pair) i", {"h": 2, "two": 2}))


def test_ranks_push_their_shards_through_a_conversion(agent, make_job) -> None:
    spec = replace(TITAN, rules=[*TITAN.rules, ROTARY])
    whole = titan(1) | {"wq": torch.randn(12, 4)}
    same_report(make_job(agent, ranks=3, conversion=spec).push(sharded(whole, 3)))
    assert arrived(agent, values(as_source(whole, spec)))


def test_replicas_that_differ_are_told_by_the_trainers_name(agent, make_job) -> None:
    """Also where what is whole at the trainer is many boxes of the checkpoint tensor."""
    spec = ConversionSpec("rotary", [ROTARY, Rule("seed", None)])
    ranks = [{"wq": torch.full((12, 4), r), "seed": torch.tensor(r)} for r in range(2)]
    assert len(as_source(ranks[0], spec).holdings()["q"]) > 1
    job = make_job(agent, ranks=2, conversion=spec)
    for error in job.push(ranks):
        assert isinstance(error, ManifestError)
        assert "'wq' is whole on ranks 0 and 1, with different values" in str(error)
    same_report(job.push([ranks[0], ranks[0] | {"seed": torch.tensor(9)}]))
