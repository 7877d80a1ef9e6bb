"""Declared models on any grid: every rank's source, and an agent whose workers have its layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from reference import Agent, Region, Worker

from tests.core.test_plan import World, load
from tests.support.grids import checkpoint, model_of
from weightsync.families.grids import inference_grid, trainer_grid
from weightsync.families.trainer import holdings
from weightsync.geometry import Box
from weightsync.layout import WorkerLayout
from weightsync.manifest import Manifest, TensorSpec
from weightsync.transport.base import Transport


class GridSource:
    """What one rank of a grid holds of a declared model."""

    def __init__(self, name: str, trainer: str, rank: int, seed: int) -> None:
        model = model_of(name, "bf16")
        self.held = {n: tuple(b) for n, b in holdings(model, trainer_grid(trainer))[rank].items()}
        self.specs = [t for t in model.manifest if t.name in self.held]
        self.values = checkpoint(model, seed)

    def manifest(self) -> Iterable[TensorSpec]:
        return self.specs

    def holdings(self) -> Mapping[str, tuple[Box, ...]]:
        return self.held

    def local(self, name: str, box_index: int) -> torch.Tensor:
        box = self.held[name][box_index]
        index = tuple(slice(a, b) for a, b in zip(box.lo, box.hi, strict=True))
        return self.values[name][index]


class GridWorker(Worker):
    """A worker whose layout is declared, with memory of its own."""

    def __init__(self, make_transport: Callable[[], Transport], layout: WorkerLayout) -> None:
        super().__init__(make_transport, layout.place)
        self.declared = layout

    def lay_out(self, manifest: Manifest, wanted: list[Region]) -> WorkerLayout:
        del wanted
        regions = []
        for region in self.declared.regions:
            fresh = torch.full((region.nbytes,), 0x5A, dtype=torch.uint8)
            buffer = self.buffers.setdefault(region.name, fresh)
            regions.append(replace(region, addr=buffer.data_ptr(), kind="DRAM"))
        used = {record.tensor for record in self.declared.records}
        skipped = tuple(t.name for t in manifest if t.name not in used)
        return replace(self.declared, regions=tuple(regions), skipped=skipped)


def grid_agent(
    make_agent: Callable[..., Agent],
    name: str,
    inference: str,
    make_transport: Callable[[], Transport] | None = None,
) -> Agent:
    """An agent of all engines of a grid."""
    agent = make_agent(make_transport=make_transport)
    make = agent.workers[0].make_transport
    layouts = inference_grid(inference).layouts(model_of(name, "bf16"))
    agent.workers = [GridWorker(make, layout) for layout in layouts]
    return agent


def has_loaded(agent: Agent, name: str, seed: int) -> bool:
    """Whether every worker has, byte for byte, what loading that checkpoint makes."""
    layouts: list[Any] = [worker.declared for worker in agent.workers]
    world = World(checkpoint(model_of(name, "bf16"), seed), layouts, None)
    return all(
        torch.equal(worker.buffers[region.name], expected)
        for worker, layout in zip(agent.workers, layouts, strict=True)
        for region, expected in zip(layout.regions, load(world, layout), strict=True)
    )
