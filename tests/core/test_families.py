from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.test_plan import World, push
from tests.support.families import CONFIGS
from tests.support.grids import checkpoint, model_of
from weightsync.errors import InputError
from weightsync.families import EngineGrid, ModelConfig, declare, engine_layouts
from weightsync.families.grids import Inference, inference_grid, trainer_grid
from weightsync.families.trainer import TrainerGrid, holdings
from weightsync.plan import Job

seeded = settings(max_examples=300, deadline=None, derandomize=True, database=None)


@st.composite
def trainers(draw: st.DrawFn) -> TrainerGrid:
    fsdp, tp = draw(st.sampled_from([1, 2, 3, 5, 8])), draw(st.sampled_from([1, 2]))
    ep = draw(st.sampled_from([n for n in (1, 2, 3, 4, 8) if fsdp * tp % n == 0]))
    return TrainerGrid(
        fsdp, draw(st.sampled_from([1, 1, 2])), tp, ep, draw(st.sampled_from([1, 1, 2]))
    )


@st.composite
def inferences(draw: st.DrawFn) -> Inference:
    dp, experts = draw(st.sampled_from([1, 1, 2])), draw(st.booleans())
    tp = draw(st.sampled_from([1, 2] if dp == 2 and not experts else [1, 2, 4]))
    engine = EngineGrid(tp, dp, draw(st.sampled_from([1, 1, 2])), experts and tp * dp <= 6)
    return Inference(engine, draw(st.sampled_from([1, 2])))


@dataclasses.dataclass(frozen=True)
class Knobs:
    """What a job may be told beside its grids."""

    split_nbytes: int
    coalesce_nbytes: int
    max_slot_nbytes: int | None


knobs = st.builds(
    Knobs,
    st.sampled_from([64, 1 << 20]),
    st.sampled_from([0, 64, 512, 1 << 20]),
    st.sampled_from([None, None, 2048, 10_000]),
)
ANY_JOB = (st.sampled_from(sorted(CONFIGS)), trainers(), inferences(), knobs)


def moved_whole(name: str, trainer: TrainerGrid, inference: Inference, told: Knobs) -> None:
    model = model_of(name, "bf16")
    world = World(
        checkpoint(model),
        inference.layouts(model),
        holdings(model, trainer),
        **dataclasses.asdict(told),
    )
    push(world, world.plans())


@seeded
@given(*ANY_JOB)
def test_any_trainer_grid_gives_any_engine_grid_exactly_its_bytes(
    name: str, trainer: TrainerGrid, inference: Inference, told: Knobs
) -> None:
    moved_whole(name, trainer, inference, told)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(seeded, max_examples=5000)
@given(*ANY_JOB)
def test_thousands_of_trainer_and_engine_grids_move_exactly_their_bytes(
    name: str, trainer: TrainerGrid, inference: Inference, told: Knobs
) -> None:
    moved_whole(name, trainer, inference, told)


@settings(seeded, max_examples=12)
@given(
    st.sampled_from(["qwen3", "qwen3_moe", "deepseek_v3", "mixtral"]),
    trainers(),
    st.sampled_from([EngineGrid(), EngineGrid(2, 1, 2), EngineGrid(2, 1, 1, True)]),
)
def test_fp8_blocks_and_their_scales_arrive_whole(
    name: str, trainer: TrainerGrid, engine: EngineGrid
) -> None:
    if engine.tp > 1 and name == "deepseek_v3":
        engine = EngineGrid(1, 2, 1, True)
    model = model_of(name, "fp8")
    assert {spec.dtype for spec in model.manifest} >= {"float8_e4m3fn", "float32"}
    world = World(checkpoint(model), engine_layouts(model, engine), holdings(model, trainer), 64)
    push(world, world.plans())


@given(st.integers(1, 9), st.integers(1, 4))
@settings(seeded, max_examples=40)
def test_shards_are_those_of_torch_chunk(fsdp: int, tp: int) -> None:
    model = model_of("qwen3", "bf16")
    ranks = holdings(model, TrainerGrid(fsdp=fsdp, tp=tp))
    for name, dim in (
        ("model.layers.0.self_attn.q_proj.weight", 0),
        ("model.layers.1.mlp.down_proj.weight", 1),
        ("model.norm.weight", None),
    ):
        whole = torch.arange(model.manifest.by_name[name].numel).reshape(
            model.manifest.by_name[name].shape
        )
        for f in range(fsdp):
            for t in range(tp):
                mine = whole
                if dim is not None:
                    parts = whole.chunk(tp, dim)
                    mine = parts[t] if t < len(parts) else whole[:0]
                parts = mine.chunk(fsdp)
                mine = parts[f] if f < len(parts) else mine[:0]
                boxes = ranks[f * tp + t].get(name, ())
                assert bool(boxes) == bool(mine.numel())
                for box in boxes:
                    index = tuple(slice(a, b) for a, b in zip(box.lo, box.hi, strict=True))
                    assert torch.equal(whole[index], mine)


def test_experts_are_spread_by_ep_and_then_sharded_whole() -> None:
    model = model_of("qwen3_moe", "bf16")  # 8 experts, layer 1 alone has some
    ranks = holdings(model, TrainerGrid(fsdp=6, ep=2))
    held = [sorted({int(n.split(".")[5]) for n in rank if ".experts." in n}) for rank in ranks]
    # ep is the fastest: even ranks share experts 0-3 in chunks of two, the last gets none
    assert held == [[0, 1], [4, 5], [2, 3], [6, 7], [], []]


def test_more_ranks_than_experts_cut_the_experts_rows() -> None:
    model = model_of("qwen3_moe", "bf16")
    ranks = holdings(model, TrainerGrid(fsdp=16, ep=4))
    gate, up = (f"model.layers.1.mlp.experts.0.{p}_proj.weight" for p in ("gate", "up"))
    boxes = [(r, n, b.lo[0], b.hi[0]) for r in (0, 4, 8, 12) for n in (gate, up)
             for b in ranks[r].get(n, ())]  # fmt: skip
    assert boxes == [(0, gate, 0, 4), (4, gate, 4, 8), (8, up, 0, 4), (12, up, 4, 8)]


def test_replicas_share_one_layout_and_one_plan() -> None:
    model = model_of("qwen3", "bf16")
    inference = Inference(EngineGrid(tp=2), engines=3)
    layouts = inference.layouts(model)
    assert [str(layout.place.engine) for layout in layouts] == ["0", "0", "1", "1", "2", "2"]
    assert layouts[0].records is layouts[4].records
    job = Job.of(model.manifest, layouts, holdings(model, TrainerGrid(fsdp=2)))
    plan = job.plan(1)
    assert plan.writes[0] is plan.writes[2] is plan.writes[4]
    alone = Job.of(model.manifest, layouts[:2], holdings(model, TrainerGrid(fsdp=2))).plan(1)
    assert plan.slot_nbytes == alone.slot_nbytes
    assert plan.nbytes == 3 * alone.nbytes


@pytest.mark.parametrize(
    ("text", "engines", "engine"),
    [
        ("tp=8,dp=4", 4, EngineGrid(8)),
        ("tp=8,dp=16,ep=8", 16, EngineGrid(8, expert_parallel=True)),
        ("tp=2,dp=8,ep=4", 4, EngineGrid(2, 2, expert_parallel=True)),
        ("engines=3,tp=2", 3, EngineGrid(2)),
        ("tp=2,dp=4,engines=1", 1, EngineGrid(2, 4)),
        ("ep=16,pp=2", 1, EngineGrid(1, 16, 2, True)),
    ],
)
def test_copies_become_engines(text: str, engines: int, engine: EngineGrid) -> None:
    assert inference_grid(text) == Inference(engine, engines)


@pytest.mark.parametrize(
    "text", ["", "tp", "tp=", "tp=x", "tp=0", "tp=-1", "tp=2,tp=2", "fsdp=2", "tp=2,ep=3",
             "tp=2,dp=3,ep=4", "dp=3,engines=2", "tp=99999999999", "ep=2,engines=2,dp=2"],
)  # fmt: skip
def test_a_bad_inference_grid_is_an_error(text: str) -> None:
    with pytest.raises(InputError, match=r"--inference"):
        inference_grid(text)


@pytest.mark.parametrize("text", ["tp=8,dp=4", "fsdp=2,ep=3", "hsdp=2,replicate=2", "fsdp=1.5"])
def test_a_bad_trainer_grid_is_an_error(text: str) -> None:
    with pytest.raises(InputError):
        trainer_grid(text)


@pytest.mark.parametrize(
    ("change", "grid", "said"),
    [
        ({}, EngineGrid(3), "cannot be cut 3 ways"),
        ({"num_attention_heads": 6}, EngineGrid(4), "heads"),
        ({}, EngineGrid(pp=4), "pipeline stages"),
        ({"hidden_size": None}, EngineGrid(), "hidden_size is None"),
        ({"hidden_size": "x"}, EngineGrid(), "hidden_size is 'x'"),
        ({"model_type": "qwen33"}, EngineGrid(), "did you mean 'qwen3'"),
        ({"index_topk": 4}, EngineGrid(), "indexer"),
    ],
)
def test_what_cannot_be_laid_out_is_an_error(
    change: dict[str, Any], grid: EngineGrid, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        engine_layouts(declare(ModelConfig({**CONFIGS["qwen3"], **change})), grid)


def test_parts_that_break_an_fp8_block_are_refused() -> None:
    model = declare(ModelConfig(CONFIGS["deepseek_v3"]), wire_dtype="fp8")
    with pytest.raises(InputError, match="fp8 block"):
        engine_layouts(model, EngineGrid(tp=2))
