from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.families import CONFIGS
from weightsync.families import EngineGrid, ModelConfig, declare
from weightsync.families.grids import Inference, inference_grid, trainer_grid
from weightsync.families.trainer import TrainerGrid, holdings
from weightsync.forecast import forecast
from weightsync.plan import Job


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("engine", [EngineGrid(2), EngineGrid(2, 2, 1, True), EngineGrid(1, 1, 2)])
@pytest.mark.parametrize("bound", [None, 10_000])
def test_the_figures_are_those_of_the_plans(
    name: str, engine: EngineGrid, bound: int | None
) -> None:
    model = declare(ModelConfig(CONFIGS[name]))
    trainer = TrainerGrid(fsdp=3, replicate=2, pp=1)
    layouts = Inference(engine, 2).layouts(model)
    job = Job.of(model.manifest, layouts, holdings(model, trainer), split_nbytes=1 << 12)
    job.prove()
    plans = [job.plan(rank, max_slot_nbytes=bound) for rank in range(trainer.ranks)]
    figures = forecast(
        job, layouts, trainer.ranks, nic_gbps=8e-9, fill_nbytes_per_s=1.0, max_slot_nbytes=bound
    )
    writes = [sum(map(len, plan.writes)) for plan in plans]
    slots = [
        len({(k, w.slot_offset) for k, r in enumerate(plan.rounds) for ws in r.writes for w in ws})
        for plan in plans
    ]
    into = [sum(w.nbytes for p in plans for w in p.writes[k]) for k in range(len(layouts))]
    assert figures.slots == sum(slots)
    assert figures.writes == sum(writes)
    assert figures.nbytes == sum(plan.nbytes for plan in plans) == sum(into)
    assert figures.rank_nbytes.max == max(plan.nbytes for plan in plans)
    assert figures.rank_writes.max == max(writes)
    assert figures.slot_nbytes.max == max(plan.slot_nbytes for plan in plans)
    assert figures.handles.max == max(sum(map(bool, plan.writes)) for plan in plans)
    assert figures.worker_nbytes.max == max(into)
    assert figures.rounds == max(len(plan.rounds) for plan in plans)
    assert (figures.rounds > 1) == (bound is not None)
    if bound is None:
        assert figures.fill_s == figures.slot_nbytes.max
    else:
        assert figures.slot_nbytes.max <= bound < figures.fill_s
    # at a byte a second the wire takes as many seconds as the busiest NIC has bytes
    assert figures.wire_s == pytest.approx(max(figures.rank_nbytes.max, *into), rel=1e-3)


@pytest.mark.parametrize(
    ("grid", "balance"),
    [
        # 48 experts over 32 ranks: some hold two, the others none, and nobody else has them
        ("fsdp=256,ep=8", 1.33),
        # 16 ranks hold three each, and their replicas as many
        ("fsdp=128,hsdp=2,ep=8", 1.005),
        ("fsdp=96,hsdp=3,ep=8", 1.005),
    ],
)
def test_ranks_write_as_evenly_as_what_they_hold_allows(grid: str, balance: float) -> None:
    config = ModelConfig.read(Path(__file__).parents[2] / "docs/examples/moe-1t.config.json")
    model = declare(ModelConfig({**config.values, "num_hidden_layers": 3}, config.where))
    layouts = inference_grid("tp=8,ep=8").layouts(model)
    trainer = trainer_grid(grid)
    job = Job.of(model.manifest, layouts, holdings(model, trainer), coalesce_nbytes=2 << 20)
    assert forecast(job, layouts, trainer.ranks).rank_nbytes.balance <= balance
