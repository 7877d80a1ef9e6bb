"""A push from several ranks, as threads: real HTTP, memory copies for a wire."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from jobs import rows, same_error, same_report, sharded
from reference import QUICK, Agent, HangUpError, Region
from test_push import arrived
from test_push_failures import refuse

from weightsync import plan as planning
from weightsync.errors import (
    AgentUnreachableError,
    EnginePausedError,
    IdentityError,
    InputError,
    ManifestError,
    NonFiniteError,
    PeerLostError,
    PlanError,
    RankFailedError,
    RegistrationError,
    StaleEpochError,
    VerifyError,
    WeightSyncError,
)
from weightsync.geometry import Box
from weightsync.transport.base import Transport
from weightsync.transport.inmemory import Fabric, InMemoryTransport


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_shards_of_all_ranks_land_and_no_byte_is_written_twice(
    ranks: int, make_agent: Callable[..., Agent], make_job, weights: dict[str, torch.Tensor]
) -> None:
    """Uneven rows, and with 8 ranks more ranks than rows."""
    agent = make_agent(n_workers=2)
    report = same_report(make_job(agent, ranks=ranks).push(sharded(weights, ranks)))
    assert arrived(agent, weights)
    assert arrived(agent, weights, worker=1)
    assert report.nbytes == 2 * sum(t.nbytes for t in weights.values())
    declared = [n for writes in agent.workers[0].writes.values() for _, _, n in writes]
    assert sum(declared) == report.nbytes // 2
    assert agent.calls.count("/connect") == agent.calls.count("/pause") == 1, "rank 0 alone"


def test_the_next_push_uses_the_handles_of_all_ranks_again(
    agent: Agent, make_job, weights: dict[str, torch.Tensor]
) -> None:
    job = make_job(agent, ranks=3)
    same_report(job.push(sharded(weights, 3)))
    for tensor in weights.values():
        tensor.add_(1)
    report = same_report(job.push(sharded(weights, 3)))
    assert report.version == 2
    assert report.rendezvous_s == 0
    assert arrived(agent, weights)
    assert agent.calls.count("/init_transfer") == 1


def test_replicas_share_the_bytes_evenly(agent: Agent, make_job) -> None:
    whole = {f"w{i}": torch.randn(10 + i, 16) for i in range(24)}
    same_report(make_job(agent, ranks=3).push([whole] * 3))
    assert arrived(agent, whole)
    sent = [sum(n for _, _, n in w) for w in agent.workers[0].writes.values()]
    assert len(sent) == 3
    assert max(sent) < 1.1 * sum(sent) / 3


def test_hybrid_shards_share_the_bytes_of_their_replicas(agent: Agent, make_job) -> None:
    whole = {f"w{i}": torch.randn(8, 64) for i in range(16)}
    shards = sharded(whole, 2)
    same_report(make_job(agent, ranks=4).push([*shards, *shards]))
    assert arrived(agent, whole)
    sent = [sum(n for _, _, n in w) for w in agent.workers[0].writes.values()]
    assert sent == [sum(t.nbytes for t in whole.values()) // 4] * 4


def test_pipeline_stages_send_what_they_alone_have(agent: Agent, make_job) -> None:
    stages = [{f"layer.{r}.{k}": torch.randn(4, 3) for k in range(2)} for r in range(3)]
    same_report(make_job(agent, ranks=3).push(stages))
    assert arrived(agent, {n: t for stage in stages for n, t in stage.items()})
    assert len(agent.workers[0].writes) == 3


def test_a_rank_that_has_nothing_takes_part(agent: Agent, make_job) -> None:
    weights = {"w": torch.randn(4)}
    same_report(make_job(agent, ranks=2).push([{}, weights]))
    assert arrived(agent, weights)
    assert list(agent.workers[0].writes) == [1]


def test_shards_go_to_fused_and_transposed_regions(
    make_agent: Callable[..., Agent], make_job
) -> None:
    agent = make_agent(
        regions=lambda _: [
            Region("qkv", "bfloat16", ["q", "k", "v"]),
            Region("down_t", "float32", ["down"], transposed=True),
        ]
    )
    tensors = {n: torch.randn(5, 6) for n in "qkv"} | {"down": torch.randn(7, 9)}
    same_report(make_job(agent, ranks=3).push(sharded(tensors, 3)))
    wanted = torch.cat([tensors[n] for n in "qkv"]).bfloat16()
    assert arrived(agent, {"qkv": wanted, "down_t": tensors["down"].t().contiguous()})


def test_generators_on_every_rank(agent: Agent, make_job, weights) -> None:
    shards = sharded(weights, 2)
    same_report(make_job(agent, ranks=2).push([(pair for pair in s.items()) for s in shards]))
    assert arrived(agent, weights)


def test_several_agents_get_the_bytes_of_all_ranks(
    make_agent: Callable[..., Agent], make_job, weights
) -> None:
    agents = [make_agent(), make_agent(n_workers=2)]
    report = same_report(make_job(*agents, ranks=2).push(sharded(weights, 2)))
    assert all(arrived(a, weights) for a in agents)
    assert len(report.agents) == 2


def test_one_rank_with_a_new_shape_makes_all_rendezvous_again(
    agent: Agent, make_job, weights
) -> None:
    job = make_job(agent, ranks=2)
    same_report(job.push(sharded(weights, 2)))
    before = sharded(weights, 2)
    before[1]["extra"] = torch.randn(3)
    report = same_report(job.push(before))
    assert report.rendezvous_s > 0
    assert agent.calls.count("/init_transfer") == 2
    assert arrived(agent, {"extra": before[1]["extra"]})


@pytest.mark.parametrize(("coalesce_bytes", "culprit"), [(0, 2), (1 << 20, 0)])
def test_non_finite_weights_on_one_rank_are_refused_on_all(
    coalesce_bytes: int, culprit: int, agent: Agent, make_job, weights
) -> None:
    """The error comes from the rank that would send them: the one that gathered, say."""
    weights["a"][-1, 0] = float("nan")
    job = make_job(agent, ranks=3, coalesce_bytes=coalesce_bytes)
    error = same_error(job.push(sharded(weights, 3)), NonFiniteError, culprit)
    assert [t["tensor"] for t in error.context["tensors"]] == ["a"]
    assert error.context["phase"] == "fill"
    assert "/pause" not in agent.calls
    assert agent.generating
    weights["a"].zero_()
    same_report(job.push(sharded(weights, 3)))
    assert agent.calls.count("/init_transfer") == 1, "the session is still good"


@pytest.mark.parametrize("versions", [[3, 4], [None, 2]])
def test_ranks_that_push_different_versions_are_refused(
    versions: list[int | None], agent: Agent, make_job, weights
) -> None:
    error = same_error(make_job(agent, ranks=2).push(sharded(weights, 2), versions), InputError, 0)
    assert "different versions" in str(error)
    assert agent.calls == []


def test_ranks_that_disagree_about_a_tensor_are_refused(agent: Agent, make_job) -> None:
    job = make_job(agent, ranks=2)
    same_error(job.push([{"w": torch.ones(2)}, {"w": torch.ones(3)}]), ManifestError, 0)
    error = same_error(job.push([{"w": torch.ones(2)}, {"w": torch.zeros(2)}]), ManifestError, 0)
    assert "different values" in str(error)
    assert "/init_transfer" not in agent.calls


def test_what_no_rank_holds_is_named_before_anything_is_connected(agent: Agent, make_job) -> None:
    shards = rows(torch.randn(6, 2), 3)
    error = same_error(
        make_job(agent, ranks=2).push([{"w": shards[0]}, {"w": shards[2]}]), PlanError, 0
    )
    assert "'w'" in str(error)
    assert "/connect" not in agent.calls


def test_the_whole_job_is_proven_once(
    agent: Agent, make_job, weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    proven: list[planning.Job] = []
    prove = planning.Job.prove
    monkeypatch.setattr(planning.Job, "prove", lambda job: (proven.append(job), prove(job)))
    same_report(make_job(agent, ranks=3).push(sharded(weights, 3)))
    assert len(proven) == 1


def test_what_one_rank_cannot_send_is_refused_on_all(agent: Agent, make_job) -> None:
    bad = {"w": torch.ones(2, device="meta")}
    error = same_error(make_job(agent, ranks=2).push([{"w": torch.ones(2)}, bad]), InputError, 1)
    assert "no dense values" in str(error)


class Failing(InMemoryTransport):
    """Fails in one of its calls."""

    def __init__(self, fabric: Fabric, call: str, error: BaseException) -> None:
        super().__init__(fabric, "trainer1")
        self.error = error
        setattr(self, call, self.fail)

    def fail(self, *_: object, **__: object) -> Any:
        raise self.error


@pytest.mark.parametrize(
    ("call", "error", "phase"),
    [
        ("register", RegistrationError("no memory"), "rendezvous"),
        ("prepare", PeerLostError("peer is gone"), "rendezvous"),
        ("post", PeerLostError("peer is gone"), "write"),
        ("wait", PeerLostError("peer is gone"), "write"),
    ],
)
def test_a_transport_that_fails_on_one_rank_fails_all_and_the_next_push_repairs(
    call: str, error: WeightSyncError, phase: str, agent: Agent, fabric: Fabric, make_job, weights
) -> None:
    made: list[Transport] = []

    def make() -> Transport:
        made.append(InMemoryTransport(fabric, "trainer1") if made else Failing(fabric, call, error))
        return made[-1]

    job = make_job(agent, ranks=3, transports={1: make})
    told = same_error(job.push(sharded(weights, 3)), type(error), 1)
    assert told.context["phase"] == phase
    torn = phase == "write"
    assert agent.state.phase == ("torn" if torn else "ready")
    assert agent.generating != torn
    assert ("/abort_update" in agent.calls) == torn
    assert same_report(job.push(sharded(weights, 3))).version == (2 if torn else 1)
    assert arrived(agent, weights)
    assert agent.calls.count("/init_transfer") == 2


def test_an_error_of_the_users_own_source_is_told_to_all(agent: Agent, make_job, weights) -> None:
    def broken():
        yield "w", torch.ones(2)
        raise ZeroDivisionError("by zero")

    results = make_job(agent, ranks=2).push([{"w": torch.ones(2)}, broken()])
    same_error(results, RankFailedError, 1)
    assert isinstance(results[1].__cause__, ZeroDivisionError)


def test_ctrl_c_on_one_rank_in_the_write_aborts_for_all(
    agent: Agent, fabric: Fabric, make_job, weights
) -> None:
    job = make_job(
        agent, ranks=2, transports={1: lambda: Failing(fabric, "wait", KeyboardInterrupt())}
    )
    first, second = job.push(sharded(weights, 2))
    assert type(second) is KeyboardInterrupt
    assert type(first) is RankFailedError
    assert agent.state.phase == "torn"
    assert agent.calls[-1] == "/abort_update"


@pytest.mark.parametrize(
    ("path", "error", "state"),
    [
        ("/init_transfer", ManifestError("unknown tensor"), "ready"),
        ("/connect", PlanError("twice"), "ready"),
        ("/begin_update", IdentityError("it moved"), "ready"),
        ("/commit_update", VerifyError("digests differ"), "torn"),
    ],
)
def test_an_agents_error_is_raised_on_all_ranks_after_the_abort(
    path: str, error: WeightSyncError, state: str, agent: Agent, make_job, weights
) -> None:
    agent.before[path] = refuse(error)
    job = make_job(agent, ranks=3)
    told = same_error(job.push(sharded(weights, 3)), type(error), 0)
    assert told.context["agent"] == agent.url
    # refused before the engine was told of a commit, the reference agent knows nothing of it
    assert agent.state.phase in {state, "torn" if path == "/commit_update" else state}
    same_report(job.push(sharded(weights, 3)))
    assert arrived(agent, weights)


def test_an_engine_paused_by_hand_stays_paused(agent: Agent, make_job, weights) -> None:
    agent.pause({})
    same_error(make_job(agent, ranks=2).push(sharded(weights, 2)), EnginePausedError, 0)
    assert agent.state.phase == "paused"


def test_a_stale_epoch_is_tried_again_by_all_ranks_together(
    agent: Agent, make_job, weights
) -> None:
    agent.before["/begin_update"] = refuse(StaleEpochError("over", hint="again"))
    same_report(make_job(agent, ranks=3).push(sharded(weights, 3)))
    assert agent.calls.count("/init_transfer") == 2
    assert arrived(agent, weights)


def test_an_agent_that_is_gone_is_named_on_all_ranks(agent: Agent, make_job, weights) -> None:
    agent.before["/init_transfer"] = refuse(HangUpError("x"), times=2)
    same_error(make_job(agent, ranks=2).push(sharded(weights, 2)), AgentUnreachableError, 0)


def test_a_rank_that_stops_in_mid_push_ends_it_for_the_others_and_the_engine(
    agent: Agent, fabric: Fabric, make_job, weights
) -> None:
    """Rank 1 hangs in its write: rank 0 aborts at the bound, rank 2 hears which rank it was."""
    go_on = threading.Event()

    class Stuck(InMemoryTransport):
        def wait(self, writes: object, *, timeout_s: float) -> None:
            go_on.wait(20)

    job = make_job(
        agent, ranks=3, apart_s=0.5, transports={1: lambda: Stuck(fabric, "trainer1")},
        deadlines=QUICK.model_copy(update={"write_s": 0.5}),
    )  # fmt: skip
    results: list[Any] = []
    waiter = threading.Thread(target=lambda: results.extend(job.push(sharded(weights, 3))))
    waiter.start()
    for _ in range(200):
        if agent.state.phase == "torn":
            break
        waiter.join(0.05)
    assert agent.state.phase == "torn"
    go_on.set()
    waiter.join(20)
    assert [type(r) for r in results] == [RankFailedError] * 3
    assert "rank 1 did not report" in str(results[0])
    assert "rank 1 did not report" in str(results[2])


def test_a_rank_that_stood_still_before_its_writes_asks_and_writes_nothing_late(
    agent: Agent, make_job, weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    def given_up() -> None:
        if agent.calls.count("/status") > 1:
            agent.state = replace(agent.state, phase="torn")

    agent.before["/status"] = given_up
    agent.before["/pause"] = lambda: time.sleep(0.2)
    monkeypatch.setattr("weightsync_client.transfer._FOLLOWER_FRESH_S", 0.1)
    error = same_error(make_job(agent, ranks=2).push(sharded(weights, 2)), StaleEpochError, 1)
    assert "has given push" in str(error)
    assert not any(agent.workers[0].buffers["c"][-24:].tolist()), "rank 1 wrote nothing"


def test_the_boxes_of_a_rank_without_rows_are_none() -> None:
    (_, second) = rows(torch.ones(1, 2), 2)
    assert Box((1, 0), (1, 2)).numel == second.tensor.numel() == 0
