"""Pushes from real jobs: gloo processes, DTensors made by torch, bytes over NIXL, real HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache

import pytest
import scenarios
import torch
from pool import Pool
from reference import Agent
from test_push_failures import refuse

from weightsync.errors import VerifyError
from weightsync.transport.base import Transport
from weightsync_client import ModuleSource

pytestmark = [pytest.mark.nixl, pytest.mark.timeout(180)]
pytest.importorskip("transformers")

BUILDS = [
    ("fsdp2", 2), ("fsdp2", 4), ("hsdp", 4), ("tied", 2), ("tp", 2), ("fsdp_tp", 4), ("stages", 2),
    ("replicas", 4), ("pairs", 4), ("moe_fsdp", 4), ("moe_ep", 2), ("moe_ep_fsdp", 4),
    ("moe_ep_hsdp", 4),
]  # fmt: skip


def nixl() -> Transport:
    from weightsync.transport.nixl import NixlTransport

    return NixlTransport("worker")


@pytest.fixture
def nixl_agent(make_agent: Callable[..., Agent]) -> Agent:
    return make_agent(n_workers=2, make_transport=nixl)


@pytest.fixture(scope="module")
def pool_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Pool]]:
    """A job of that many ranks, started where it is first needed."""
    with ExitStack() as pools:

        @cache
        def get(ranks: int) -> Pool:
            return pools.enter_context(Pool(ranks, tmp_path_factory.mktemp("pool")))

        yield get


def wanted_of(build: str, seed: int) -> dict[str, torch.Tensor]:
    if build.startswith("moe"):
        source = ModuleSource(scenarios.fused(seed))
        return {t.name: source.local(t.name, 0) for t in source.manifest()}
    model = scenarios.Model(seed, tied=build == "tied")
    names = dict(model.named_parameters())  # once each
    return {n: t for n, t in model.state_dict().items() if n in names}


@pytest.mark.parametrize(("build", "ranks"), BUILDS)
def test_every_byte_of_a_sharded_model_lands_once(
    build: str, ranks: int, nixl_agent: Agent, pool_of: Callable[[int], Pool]
) -> None:
    results = pool_of(ranks).run(scenarios.push, nixl_agent.url, build, [3, 4])
    assert all(isinstance(r, list) for r in results), results
    assert all(r == results[0] for r in results)
    wanted = wanted_of(build, seed=4)
    for worker in nixl_agent.workers:
        for name, tensor in wanted.items():
            landed = worker.tensor(name, tensor.dtype, tuple(tensor.shape))
            assert torch.equal(landed, tensor.detach()), name
        declared = [n for writes in worker.writes.values() for _, _, n in writes]
        assert sum(declared) == sum(t.nbytes for t in wanted.values())
        assert len(worker.writes) == ranks, "all ranks write"
    second = results[0][1]
    assert second["rendezvous_s"] == 0
    assert second["nbytes"] == 2 * sum(t.nbytes for t in wanted.values())


def test_weights_that_are_not_finite_on_one_rank_are_refused_on_all(
    nixl_agent: Agent, pool_of: Callable[[int], Pool]
) -> None:
    results = pool_of(4).run(scenarios.push_with, nixl_agent.url, "nan", 1)
    assert [r[0] for r in results] == [1] * 4
    assert [r[1][:2] for r in results] == [results[0][1][:2]] * 4
    assert results[0][1][0] == "NonFiniteError"
    assert "rank 1: 'w1': 1 of 16 values" in results[0][1][1]
    assert [r[2] for r in results] == [2] * 4


@pytest.mark.parametrize("members", [[1, 3], [0, 1, 2]])
def test_the_ranks_of_a_group_push_without_the_others(
    members: list[int], nixl_agent: Agent, pool_of: Callable[[int], Pool]
) -> None:
    results = pool_of(4).run(scenarios.push_from, nixl_agent.url, members)
    assert results == [[1, 2] if rank in members else None for rank in range(4)]
    for worker in nixl_agent.workers:
        for rank in members:
            assert worker.tensor(f"w{rank}", torch.float32, (4,)).tolist() == [rank] * 4


def test_one_rank_of_a_job_may_push_alone(
    nixl_agent: Agent, pool_of: Callable[[int], Pool]
) -> None:
    assert pool_of(2).run(scenarios.push_alone, nixl_agent.url) == [1, None]


def test_a_killed_rank_ends_the_push_of_all_others_at_once(
    nixl_agent: Agent, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with Pool(3, tmp_path_factory.mktemp("killed")) as pool:
        started = time.monotonic()
        results = pool.run(scenarios.push_with, nixl_agent.url, "kill", 1)
        assert time.monotonic() - started < 30
        assert results[1] is None
        for survivor in (results[0], results[2]):
            good, (name, text, seconds), (later, later_text, later_s) = survivor
            assert good == 1
            assert name == later == "RankFailedError"
            assert "rank 1 of the training job is gone" in text
            assert seconds < scenarios.DEADLINES.ranks_s
            assert "in an earlier push" in later_text
            assert later_s < 1
    assert nixl_agent.generating
    assert nixl_agent.state.phase == "ready"


@pytest.mark.parametrize("ranks", [2, 4])
def test_small_shards_are_exchanged_by_the_ranks_and_written_once(
    ranks: int, nixl_agent: Agent, pool_of: Callable[[int], Pool]
) -> None:
    results = pool_of(ranks).run(scenarios.push_cut, nixl_agent.url, "none", 0)
    assert results == [[1, 2, 3]] * ranks
    for worker in nixl_agent.workers:
        assert sorted(map(len, worker.writes.values())) == [8 // ranks] * ranks
        for k in range(8):
            landed = worker.tensor(f"n{k}", torch.float32, (12,))
            assert torch.equal(landed, torch.arange(12.0) + 100 * k + 2)


def test_a_rank_that_is_killed_in_the_exchange_ends_the_push_of_all_others_at_once(
    nixl_agent: Agent, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with Pool(3, tmp_path_factory.mktemp("exchange")) as pool:
        results = pool.run(scenarios.push_cut, nixl_agent.url, "kill", 1)
        for survivor in (results[0], results[2]):
            good, (name, text, seconds), (later, later_text, later_s) = survivor
            assert good == 1
            assert name == later == "RankFailedError"
            assert "rank 1 of the training job is gone" in text
            assert seconds < scenarios.DEADLINES.ranks_s
            assert "in an earlier push" in later_text
            assert later_s < 1
    assert nixl_agent.generating
    assert nixl_agent.state.phase == "ready"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["late", "leave"])
def test_a_rank_that_misses_the_exchange_fails_it_for_all_within_the_bound(
    fault: str, nixl_agent: Agent, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with Pool(3, tmp_path_factory.mktemp(fault)) as pool:
        results = pool.run(scenarios.push_cut, nixl_agent.url, fault, 1)
        for good, (name, _, seconds), (later, _, later_s) in results:
            assert good == 1
            assert name == later == "RankFailedError"
            assert seconds < 2 * scenarios.DEADLINES.write_s + scenarios.DEADLINES.ranks_s
            assert later_s < 1
    assert nixl_agent.generating
    assert nixl_agent.state.phase == "ready"


@pytest.mark.slow
def test_a_stopped_rank_is_named_to_all_others_within_the_bound(
    nixl_agent: Agent, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with Pool(3, tmp_path_factory.mktemp("stopped")) as pool:
        results = pool.run(scenarios.push_with, nixl_agent.url, "stop", 1)
        for survivor in (results[0], results[2]):
            _, (name, text, seconds), _ = survivor
            assert name == "RankFailedError"
            assert "rank 1 of the training job did not report in" in text
            assert seconds < 2 * scenarios.DEADLINES.ranks_s
    assert nixl_agent.generating


def test_a_fleet_of_two_is_warmed_up_loses_one_and_catches_it_up(
    make_agent: Callable[..., Agent], pool_of: Callable[[int], Pool]
) -> None:
    good, bad = (make_agent(n_workers=2, make_transport=nixl) for _ in range(2))
    bad.before["/commit_update"] = refuse(VerifyError("digests differ", hint="look"))
    results = pool_of(2).run(scenarios.push_fleet, [good.url, bad.url])
    assert results[0] == results[1] == [
        [True, True], 2, [True, True],
        [(True, "", ""), (False, "commit", "verify_failed")],
        (0, 1), (0, 2, [True, True]),
    ]  # fmt: skip
    assert [a.calls.count("/init_transfer") for a in (good, bad)] == [1, 2]
    for agent in (good, bad):
        for worker in agent.workers:
            for k in (*range(8), 9):
                landed = worker.tensor(f"w{k}", torch.float32, (64, 8))
                assert torch.equal(landed, torch.full((64, 8), 20.0 + k))


@pytest.mark.parametrize(("how", "culprit"), [("ctrl-c", 0), ("sigterm", 1)])
def test_a_signal_to_one_rank_in_its_write_aborts_and_the_next_push_repairs(
    how: str, culprit: int, nixl_agent: Agent, pool_of: Callable[[int], Pool]
) -> None:
    results = pool_of(2).run(scenarios.end_in_push, nixl_agent.url, how, culprit)
    own = {"ctrl-c": "KeyboardInterrupt", "sigterm": "SystemExit"}[how]
    for rank, told in enumerate(results):
        assert told == [1, own if rank == culprit else "RankFailedError", 3]
    assert nixl_agent.generating
    assert nixl_agent.calls.count("/abort_update") == 1
