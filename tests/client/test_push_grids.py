"""Whole pushes between random grids: threads and copies, or gloo processes and NIXL."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from typing import Any

import pytest
import scenarios
from grids import GridSource, grid_agent, has_loaded
from jobs import same_report
from pool import Pool
from reference import Agent

from tests.support.families import CONFIGS
from tests.support.grids import model_of
from weightsync.errors import InputError
from weightsync.families.grids import inference_grid, trainer_grid
from weightsync.slab import ALIGN_NBYTES
from weightsync.transport.base import Transport

TRAINERS = {
    2: ["fsdp=2", "tp=2", "hsdp=2", "pp=2", "fsdp=2,ep=2"],
    3: ["fsdp=3", "hsdp=3", "fsdp=3,ep=3"],
    4: [
        "fsdp=4", "fsdp=2,tp=2", "fsdp=2,hsdp=2", "fsdp=4,ep=2", "fsdp=2,tp=2,ep=4", "fsdp=2,pp=2",
        "tp=2,hsdp=2,ep=2",
    ],
    6: ["fsdp=6,ep=3", "fsdp=3,tp=2", "fsdp=3,hsdp=2,ep=3", "fsdp=3,pp=2,ep=3", "tp=3,hsdp=2,ep=3"],
}  # fmt: skip
ENGINES = ["tp=1", "tp=2", "tp=4", "dp=2", "tp=2,pp=2", "tp=2,ep=2", "tp=2,dp=2,ep=4", "tp=2,dp=2"]
Case = tuple[str, str, str, dict[str, Any]]


def drawn(seed: int, sizes: list[int]) -> Case:
    """A model, a trainer, an engine that divides it, and what the publisher is told."""
    draw = random.Random(seed)
    while True:
        name, engine = draw.choice(sorted(CONFIGS)), draw.choice(ENGINES)
        try:
            inference_grid(engine).layouts(model_of(name, "bf16"))
        except InputError:
            continue
        told = {
            "coalesce_bytes": draw.choice([0, 256, 1 << 20]),
            "max_slot_bytes": draw.choice([None, ALIGN_NBYTES, 4 * ALIGN_NBYTES]),
        }
        return name, draw.choice(TRAINERS[draw.choice(sizes)]), engine, told


def push_by_threads(case: Case, make_agent: Callable[..., Agent], make_job: Any) -> None:
    name, trainer, engine, told = case
    agent = grid_agent(make_agent, name, engine)
    job = make_job(agent, ranks=trainer_grid(trainer).ranks, **told)
    for seed in (1, 2):
        sources = [GridSource(name, trainer, r, seed) for r in range(len(job.publishers))]
        same_report(job.push(sources))
        assert has_loaded(agent, name, seed)
    assert agent.calls.count("/init_transfer") == 1


@pytest.mark.parametrize("seed", range(20))
def test_ranks_of_any_grid_push_to_workers_of_any_grid(
    seed: int, make_agent: Callable[..., Agent], make_job: Any
) -> None:
    push_by_threads(drawn(seed, [2, 3, 4]), make_agent, make_job)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1200))
def test_ranks_of_many_grids_push_to_workers_of_many_grids(
    seed: int, make_agent: Callable[..., Agent], make_job: Any
) -> None:
    push_by_threads(drawn(seed, [2, 3, 4, 6]), make_agent, make_job)


# ------------------------------------------------------------------ real processes, real wire


@pytest.fixture(scope="module")
def pool_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Pool]]:
    """A job of that many ranks, started where it is first needed."""
    with ExitStack() as pools:

        @cache
        def get(ranks: int) -> Pool:
            return pools.enter_context(Pool(ranks, tmp_path_factory.mktemp("pool")))

        yield get


def nixl() -> Transport:
    from weightsync.transport.nixl import NixlTransport

    return NixlTransport("worker")


@pytest.mark.slow
@pytest.mark.nixl
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(2000, 2024))
def test_processes_of_any_grid_push_over_nixl_to_workers_of_any_grid(
    seed: int, make_agent: Callable[..., Agent], pool_of: Callable[[int], Pool]
) -> None:
    name, trainer, engine, told = drawn(seed, [2, 4])
    agent = grid_agent(make_agent, name, engine, nixl)
    ranks = trainer_grid(trainer).ranks
    results = pool_of(ranks).run(scenarios.push_grid, agent.url, name, trainer, told, timeout_s=120)
    assert results == [[1, 2]] * ranks
    assert has_loaded(agent, name, 2)
