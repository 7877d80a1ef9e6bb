"""Agents that fail in some step of a push are dropped, and take part in the next one again."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from jobs import same_error, same_report, sharded
from reference import Agent
from rich.console import Console
from test_push import arrived
from test_push_failures import inject_at_pause, refuse

from weightsync.errors import (
    EngineError,
    InputError,
    PeerLostError,
    StaleEpochError,
    VerifyError,
    WeightSyncError,
)
from weightsync.transport.base import PreparedWrite
from weightsync.transport.inmemory import Fabric, Faults, InMemoryTransport
from weightsync_client import Deadlines, Publisher, Quorum
from weightsync_client.progress import TerminalProgress

Make = Callable[..., Any]
#: the call that fails, and the phase that the report then names
STEPS = [
    ("/status", "status"),
    ("/init_transfer", "rendezvous"),
    ("/connect", "rendezvous"),
    ("/pause", "pause"),
    ("/begin_update", "begin"),
    ("/commit_update", "commit"),
    ("/resume", "resume"),
]


class Picky(InMemoryTransport):
    """Fails to write to some peers."""

    def __init__(self, fabric: Fabric, refuses: Callable[[str], bool]) -> None:
        super().__init__(fabric, "picky")
        self.refuses = refuses

    def post(self, write: PreparedWrite, notification: bytes) -> None:
        if self.refuses(write.peer):
            raise PeerLostError(f"{write.peer} is gone", hint="look there")
        super().post(write, notification)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize(("path", "phase"), STEPS)
@pytest.mark.parametrize("policy", ["available", Quorum(1)])
def test_an_agent_that_fails_is_dropped_told_and_takes_part_in_the_next_push(
    policy: Any, path: str, phase: str, ranks: int, make_agent: Make, make_job: Make, weights: Any
) -> None:
    good, bad = make_agent(), make_agent()
    # two refusals, so that the way back of a failed resume fails, too
    bad.before[path] = refuse(EngineError("no more", hint="look"), times=2)
    job = make_job(good, bad, ranks=ranks, policy=policy)
    report = same_report(job.push(sharded(weights, ranks)))
    assert [agent.ok for agent in report.agents] == [True, False]
    told = report.agents[1]
    assert (told.url, told.phase, told.code) == (bad.url, phase, "engine_error")
    assert "no more" in told.error
    assert good.state.phase == "ready"
    assert good.state.version == report.version == 1
    assert arrived(good, weights)
    assert good.calls.count("/resume") == 1

    del bad.before[path], bad.calls[:]
    if bad.state.phase == "paused":  # its resume failed: the agent's idle deadline resumes it
        bad.resume({"push_id": bad.state.owner})
    for tensor in weights.values():
        tensor.add_(1)
    report = same_report(job.push(sharded(weights, ranks)))
    assert [(a.ok, a.version) for a in report.agents] == [(True, 2)] * 2
    assert arrived(good, weights)
    assert arrived(bad, weights)
    assert good.calls.count("/init_transfer") == 1, "the rendezvous was the other one's alone"
    assert bad.calls.count("/init_transfer") == 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_agent_that_one_rank_cannot_write_to_is_dropped_by_all(
    ranks: int, make_agent: Make, make_job: Make, weights: Any, fabric: Fabric
) -> None:
    good, bad = make_agent(n_workers=2), make_agent(n_workers=2)
    broken = [True]

    def refuses(peer: str) -> bool:
        return broken[0] and peer == bad.workers[1].transport.name

    last = ranks - 1
    job = make_job(
        good, bad, ranks=ranks, policy="available",
        transports={last: lambda: Picky(fabric, refuses)},
    )  # fmt: skip
    report = same_report(job.push(sharded(weights, ranks)))
    assert [a.ok for a in report.agents] == [True, False]
    assert (report.agents[1].phase, report.agents[1].code) == ("write", "peer_lost")
    assert ("rank 1: " in report.agents[1].error) == (ranks == 2)
    assert report.agents[1].state == bad.state.phase == "torn"
    assert not bad.generating
    assert "/commit_update" not in bad.calls
    assert "write: PeerLostError" in bad.bodies["/abort_update"]["reason"]
    deadline = time.monotonic() + 10  # each rank's word that its handles are gone comes aside
    while len(bad.released) < ranks and time.monotonic() < deadline:
        time.sleep(0.01)
    assert {(word.push_id, word.session) for word in bad.released} == {
        (report.push_id, bad.bodies["/abort_update"]["session"])
    }
    assert len(bad.released) == ranks
    assert good.released == []
    assert arrived(good, weights)
    assert arrived(good, weights, worker=1)

    broken[0] = False
    report = same_report(job.push(sharded(weights, ranks)))
    assert [(a.ok, a.state) for a in report.agents] == [(True, "ready")] * 2
    assert arrived(bad, weights, worker=1)
    assert good.calls.count("/init_transfer") == 1


def test_writes_that_never_complete_cost_one_deadline_and_end_the_epoch(
    make_agent: Make, make_publisher: Make, weights: Any, fabric: Fabric
) -> None:
    """They may land later (WS-3, WS-8): the slots and handles of that epoch are not used again."""
    good, bad = make_agent(), make_agent()
    inject_at_pause(bad, Faults(lose_write=True))
    quick = Deadlines(write_s=0.2, floor_bytes_per_s=1e9)
    publisher = make_publisher(good, bad, policy="available", deadlines=quick)
    report = publisher.push(weights)
    assert [a.ok for a in report.agents] == [True, False]
    assert report.agents[1].code == "deadline_exceeded"
    assert report.write_s < 2
    assert arrived(good, weights)
    assert not any(name.startswith("trainer") for name in fabric.ends), "its transport is closed"
    del bad.before["/pause"]
    report = publisher.push(weights)
    assert [a.ok for a in report.agents] == [True, True]
    assert arrived(bad, weights)


def test_a_rounds_late_agent_does_not_take_the_other_ones_time(
    make_agent: Make, make_publisher: Make
) -> None:
    weights = {"w": torch.randn(64, 1024)}
    good, bad = make_agent(), make_agent()
    inject_at_pause(bad, Faults(lose_write=True))
    publisher = make_publisher(
        good, bad, policy="available", max_slot_bytes=1 << 15,
        deadlines=Deadlines(write_s=0.3, floor_bytes_per_s=1e9),
    )  # fmt: skip
    report = publisher.push(weights)
    assert report.rounds > 2
    assert [a.ok for a in report.agents] == [True, False]
    assert arrived(good, weights)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("path", ["/status", "/begin_update", "/commit_update"])
def test_fewer_than_the_quorum_fail_the_push_for_all(
    path: str, ranks: int, make_agent: Make, make_job: Make, weights: Any
) -> None:
    agents = [make_agent() for _ in range(3)]
    for bad in agents[1:]:
        bad.before[path] = refuse(VerifyError("no more", hint="look"), times=2)
    job = make_job(*agents, ranks=ranks, policy=Quorum(2))
    results = job.push(sharded(weights, ranks))
    error = results[0] if ranks == 1 else same_error(results, VerifyError, 0)
    assert type(error) is VerifyError
    notes = "\n".join(error.__notes__)
    assert "1 of 3 agents are left, the policy wants 2" in notes
    if path == "/begin_update":
        assert all(a.state.phase in {"ready", "torn"} for a in agents)
    if path == "/commit_update":
        assert agents[0].state.version == 1, "it had committed: it serves a whole version"
    for agent in agents:
        agent.before.clear()
    same_report(job.push(sharded(weights, ranks)))
    assert all(arrived(a, weights) for a in agents)


def test_a_resume_that_works_at_the_second_try_is_no_failure(
    make_agent: Make, make_publisher: Make, model: Any
) -> None:
    good, slow = make_agent(), make_agent()
    slow.before["/resume"] = refuse(EngineError("busy", hint="again"))
    publisher = make_publisher(good, slow, policy="available")
    report = publisher.push(model)
    assert [(a.ok, a.state, a.version) for a in report.agents] == [(True, "ready", 1)] * 2
    assert slow.generating
    assert publisher.push(model).rendezvous_s == 0


def test_the_last_agent_is_not_dropped(make_agent: Make, make_publisher: Make, model: Any) -> None:
    bad = make_agent()
    bad.before["/pause"] = refuse(EngineError("no more", hint="look"))
    with pytest.raises(EngineError) as caught:
        make_publisher(bad, policy="available").push(model)
    assert "0 of 1 agents are left, the policy wants 1" in "\n".join(caught.value.__notes__)


def test_an_epoch_that_ends_before_begin_is_that_agents_failure_alone(
    make_agent: Make, make_publisher: Make, model: Any
) -> None:
    good, bad = make_agent(), make_agent()
    bad.before["/begin_update"] = refuse(StaleEpochError("over", hint="again"))
    report = make_publisher(good, bad, policy="available").push(model)
    assert [a.ok for a in report.agents] == [True, False]
    assert good.calls.count("/begin_update") == 1


def test_an_agent_that_does_not_answer_its_abort_does_not_hold_the_others(
    make_agent: Make, make_publisher: Make, model: Any
) -> None:
    good, bad = make_agent(), make_agent()
    bad.before["/begin_update"] = refuse(EngineError("no more", hint="look"))
    held: list[bool] = []

    def slow() -> None:
        for _ in range(100):
            if good.generating and good.state.version == 1:
                held.append(False)
                return
            time.sleep(0.02)
        held.append(True)

    bad.before["/abort_update"] = slow
    report = make_publisher(good, bad, policy="available").push(model)
    assert held == [False], "the good one served the version before the abort was answered"
    assert report.agents[1].state == bad.state.phase


def test_the_report_says_how_many_agents_serve_it(
    make_agent: Make, make_publisher: Make, model: Any
) -> None:
    publisher = make_publisher(make_agent(), "http://127.0.0.1:9", policy="available")
    report = publisher.push(model)
    assert "to 1 of 2 agents" in str(report)
    assert report.to_dict()["agents"][1]["code"] == "agent_unreachable"
    assert report.to_dict()["agents"][1]["state"] == "unknown"


def test_a_quorum_larger_than_the_fleet_is_refused(agent: Agent, make_publisher: Make) -> None:
    with pytest.raises(InputError, match="a quorum of 3 of 1 agents"):
        make_publisher(agent, policy=Quorum(3)).push({"w": torch.ones(2)})
    assert agent.calls == []


@pytest.mark.parametrize("policy", ["most", 2, None])
def test_an_unknown_policy_is_refused(policy: Any) -> None:
    with pytest.raises(InputError, match="unknown policy"):
        Publisher(["http://127.0.0.1:9"], policy=policy)
    with pytest.raises(InputError, match="a quorum of 0"):
        Quorum(0)


def test_errors_of_the_trainer_itself_drop_nobody(
    make_agent: Make, make_job: Make, weights: Any
) -> None:
    agents = [make_agent(), make_agent()]
    job = make_job(*agents, ranks=2, policy="available")
    weights["a"][0, 0] = float("nan")
    for error in job.push(sharded(weights, 2)):
        assert isinstance(error, WeightSyncError)
        assert error.code == "non_finite_weights"
    weights["a"][0, 0] = 0.0
    report = same_report(job.push(sharded(weights, 2)))
    assert all(a.ok for a in report.agents)


def test_a_terminal_names_who_was_dropped(make_agent: Make, make_publisher: Make) -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=300)
    bad = make_agent()
    bad.before["/begin_update"] = refuse(EngineError("no more", hint="look"))
    publisher = make_publisher(
        make_agent(), bad, policy="available", progress=TerminalProgress(console)
    )
    publisher.push({"w": torch.ones(2)})
    told = console.file.getvalue()
    assert "✓ v1" in told
    assert f"✗ {bad.url} was dropped in begin: agent {bad.url}: no more (look)" in told
