"""What one rank holds of DTensors, FSDP2 modules and sharded transformers models."""

from __future__ import annotations

import pytest
import torch
from fake_world import mesh_of, shard
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from tests.support.models import new_model
from weightsync.errors import InputError, ManifestError
from weightsync.geometry import Box
from weightsync_client import LocalShard, ModuleSource, StateDictSource
from weightsync_client.declaration import Declaration, introduce, join
from weightsync_client.source import WeightSource

transformers = pytest.importorskip("transformers")


class Job:
    """All ranks of a job, put together from what each declares."""

    def __init__(self, build, mesh_shape, names=None) -> None:
        self.introductions = []
        self.values: dict[str, torch.Tensor] = {}
        self.times: dict[str, torch.Tensor] = {}
        sources = []
        for rank in range(int(torch.tensor(mesh_shape).prod())):
            with mesh_of(rank, mesh_shape, names) as mesh:
                sources.append(source := build(mesh))
                self.introductions.append(introduce(Declaration.of(source), source, alone=False))
        self.manifest = join(self.introductions)
        for source in sources:
            self._add(source)

    def _add(self, source: WeightSource) -> None:
        declaration = Declaration.of(source)
        for spec in declaration.tensors:
            dtype = getattr(torch, spec.dtype)
            whole = self.values.setdefault(spec.name, torch.zeros(spec.shape, dtype=dtype))
            times = self.times.setdefault(spec.name, torch.zeros(spec.shape, dtype=torch.int64))
            for index, box in enumerate(declaration.holdings[spec.name]):
                at = tuple(slice(a, b) for a, b in zip(box.lo, box.hi, strict=True))
                whole[at] = source.local(spec.name, index)
                times[at] += 1

    def assert_equals(self, wanted: dict[str, torch.Tensor], copies: int | None = 1) -> None:
        assert self.values.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(self.values[name], tensor.detach()), name
            if copies is not None:
                assert (self.times[name] == copies).all(), name


def mlp(rows: int = 9) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, rows), nn.Linear(rows, 4, bias=False), nn.LayerNorm(4))


def wanted_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in module.state_dict().items()}


@pytest.mark.parametrize("ranks", [2, 4, 7])
def test_fsdp2_with_uneven_and_empty_shards(ranks: int) -> None:
    """Rows 9 and 4 over 7 ranks: short, and none on the last ranks."""
    Job(lambda mesh: ModuleSource(fully_shard(mlp(), mesh=mesh)), (ranks,)).assert_equals(
        wanted_of(mlp())
    )


def test_hsdp_has_every_element_on_each_replica() -> None:
    def build(mesh) -> WeightSource:
        return ModuleSource(fully_shard(mlp(), mesh=mesh))

    Job(build, (2, 2), ("replicate", "shard")).assert_equals(wanted_of(mlp()), copies=2)


def tensor_parallel(mesh) -> nn.Module:
    styles = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    return parallelize_module(mlp(8), mesh, styles, src_data_rank=None)


def test_tensor_parallel_has_columns_rows_and_plain_replicas() -> None:
    job = Job(lambda mesh: ModuleSource(tensor_parallel(mesh)), (2,), ("tp",))
    job.assert_equals(wanted_of(mlp(8)), copies=None)
    assert (job.times["1.weight"] == 1).all()
    assert (job.times["2.weight"] == 2).all()
    assert job.introductions[1].declaration.holdings["1.weight"] == (Box((0, 4), (4, 8)),)


def test_fsdp2_over_tensor_parallel_has_strided_shards() -> None:
    def build(mesh) -> WeightSource:
        module = tensor_parallel(mesh["tp"])
        for child in module:
            fully_shard(child, mesh=mesh["dp"])
        weight = module[0].weight
        assert isinstance(weight, DTensor)
        assert "Strided" in type(weight.placements[0]).__name__
        return ModuleSource(module)

    job = Job(build, (2, 2), ("dp", "tp"))
    job.assert_equals(wanted_of(mlp(8)), copies=None)
    assert (job.times["0.weight"] == 1).all()


def test_expert_parallel_meshes_and_state_dicts_of_dtensors() -> None:
    experts = torch.randn(6, 5, 4)
    wide = torch.randn(5, 10)

    def build(mesh) -> WeightSource:
        return StateDictSource(
            {
                "experts": shard(experts, mesh, Shard(0), Shard(1)),
                "twice": shard(experts, mesh, Shard(0), Shard(0)),
                "wide": shard(wide, mesh, Replicate(), Shard(1)),
                "plain": torch.ones(3),
            }
        )

    job = Job(build, (2, 3), ("ep", "fsdp"))
    wanted = {"experts": experts, "twice": experts, "wide": wide, "plain": torch.ones(3)}
    job.assert_equals(wanted, copies=None)
    assert (job.times["wide"] == 2).all()


def test_a_rank_outside_a_tensors_mesh_holds_nothing_of_it() -> None:
    def build(mesh) -> WeightSource:
        rank = mesh.get_rank()
        stage = torch.distributed.device_mesh.DeviceMesh("cpu", [2, 3])
        tensors = {"last": shard(torch.ones(4, 2), stage, Shard(0))}
        assert rank in {2, 3} or not StateDictSource(tensors).holdings()["last"]
        return StateDictSource(tensors)

    Job(build, (4,)).assert_equals({"last": torch.ones(4, 2)})


def test_local_shards_without_dtensor() -> None:
    whole = torch.randn(6, 4)

    def build(mesh) -> WeightSource:
        lo = 3 * mesh.get_rank()
        return StateDictSource([("w", LocalShard(whole[lo : lo + 3], (6, 4), (lo, 0)))])

    Job(build, (2,)).assert_equals({"w": whole})
    with pytest.raises(InputError, match=r"\[3, 4\] at \[4, 0\] is no part of \[6, 4\]"):
        StateDictSource({"w": LocalShard(whole[:3], (6, 4), (4, 0))})


def test_partial_values_are_refused() -> None:
    with mesh_of(0, (2,)) as mesh:
        partial = DTensor.from_local(torch.ones(2), mesh, [Partial()], run_check=False)
        with pytest.raises(InputError, match=r"'w' has placement .*: each rank holds a summand"):
            StateDictSource({"w": partial})


def test_tied_shards_are_aliases_even_where_a_rank_has_none_of_it() -> None:
    def build(mesh) -> WeightSource:
        tied = shard(torch.ones(2, 4), mesh, Shard(0))
        return StateDictSource({"embed": tied, "head": tied})

    job = Job(build, (3,))
    assert job.manifest.by_name["head"].alias_of == "embed"
    assert job.introductions[2].declaration.holdings["embed"] == ()


def test_a_name_that_is_tied_on_one_stage_alone_is_no_alias() -> None:
    def build(mesh) -> WeightSource:
        weight = torch.ones(2)
        last = {"head": torch.ones(2)}
        return StateDictSource({"embed": weight, "head": weight} if mesh.get_rank() == 0 else last)

    assert Job(build, (2,)).manifest.by_name["head"].alias_of == ""


def test_pipeline_stages_make_one_manifest() -> None:
    def build(mesh) -> WeightSource:
        return StateDictSource({f"layer.{mesh.get_rank()}": torch.ones(2)})

    job = Job(build, (3,))
    assert [t.name for t in job.manifest] == ["layer.0", "layer.1", "layer.2"]


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (torch.ones(3), r"float32 \[2\] on rank 0 and float32 \[3\] on rank 1"),
        (torch.ones(2).half(), r"float32 \[2\] on rank 0 and float16 \[2\] on rank 1"),
        (torch.zeros(2), "whole on ranks 0 and 1, with different values"),
    ],
)
def test_plain_tensors_must_be_equal_on_all_ranks(other: torch.Tensor, says: str) -> None:
    with pytest.raises(ManifestError, match=says):
        Job(lambda m: StateDictSource({"w": other if m.get_rank() else torch.ones(2)}), (2,))


def sharded_experts(model: nn.Module, mesh, *placements) -> nn.Module:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            whole = parameter.detach()
            part = (
                shard(whole, mesh, *placements)
                if whole.ndim == 3
                else shard(whole, mesh, *[Shard(0)] * mesh.ndim)
            )
            setattr(module, name, nn.Parameter(part))
    return model


@pytest.mark.parametrize("placements", [(Shard(0),), (Shard(1),), (Shard(2),)])
@pytest.mark.parametrize("ranks", [2, 3])
def test_fused_experts_are_published_as_checkpoint_experts_however_sharded(
    placements, ranks: int
) -> None:
    """Shards over the experts, over gate and up (across their border), over the hidden dim."""
    model = new_model("qwen3_moe", seed=1)
    whole = ModuleSource(model)
    wanted = {t.name: whole.local(t.name, 0) for t in whole.manifest()}
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in wanted

    def build(mesh) -> WeightSource:
        return ModuleSource(sharded_experts(new_model("qwen3_moe", seed=1), mesh, *placements))

    Job(build, (ranks,)).assert_equals(wanted)


def test_expert_parallel_times_fsdp_of_a_fused_model() -> None:
    whole = ModuleSource(new_model("qwen3_moe", seed=2))
    wanted = {t.name: whole.local(t.name, 0) for t in whole.manifest()}

    def build(mesh) -> WeightSource:
        return ModuleSource(
            sharded_experts(new_model("qwen3_moe", seed=2), mesh, Shard(0), Shard(1))
        )

    Job(build, (2, 2)).assert_equals(wanted)


def test_interleaved_and_transposed_experts_are_strided_boxes() -> None:
    """gpt-oss keeps gate and up interleaved and saves them so."""
    config = transformers.GptOssConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip

    def model() -> nn.Module:
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config)

    whole = ModuleSource(model())
    wanted = {t.name: whole.local(t.name, 0) for t in whole.manifest()}
    Job(lambda mesh: ModuleSource(sharded_experts(model(), mesh, Shard(1))), (3,)).assert_equals(
        wanted
    )


def test_a_computed_conversion_of_shards_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.core_model_loading as loading

    monkeypatch.setattr(
        loading, "revert_weight_conversion", lambda _, ts: {n: t * 2 for n, t in ts.items()}
    )
    with mesh_of(0, (2,)) as mesh:
        model = sharded_experts(new_model("llama", seed=1), mesh)
        with pytest.raises(InputError, match=r"computes new tensors, and .* is sharded"):
            ModuleSource(model)
