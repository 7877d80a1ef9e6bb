"""Two engines, two agents, real NIXL: one fails, the other serves, and nobody hangs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.stack import QUICK, Daemon, Stack, new_engine
from weightsync_client import Publisher

pytestmark = [pytest.mark.nixl, pytest.mark.slow]


@pytest.fixture(scope="module")
def second_stack(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("second")
    engine = new_engine(checkpoint, folder / "engine.log")
    engine.start()
    stack = Stack(checkpoint, folder, engine, ["--push-idle-timeout-s", "3"], QUICK)
    try:
        yield stack
    finally:
        stack.close()
        engine.stop()


@pytest.fixture
def other(second_stack: Stack) -> Stack:
    second_stack.heal()
    return second_stack


@pytest.fixture
def fleet(stack: Stack, other: Stack) -> Iterator[Publisher]:
    """Of both; what a test wants to happen in a phase it hooks into the first stack's progress."""
    agents = [stack.agent.url, other.agent.url]
    with Publisher(
        agents, policy="available", token="a-token-for-the-tests", deadlines=QUICK,
        progress=stack.progress,
    ) as publisher:  # fmt: skip
        yield publisher


def test_a_warmup_of_real_engines_writes_and_changes_nothing(
    fleet: Publisher, stack: Stack, other: Stack
) -> None:
    before = [s.held() for s in (stack, other)]
    report = fleet.warmup(stack.weights())
    assert [(a.ok, a.state) for a in report.agents] == [(True, "ready")] * 2
    assert report.slowest[0].nbytes > 0
    for one, held in zip((stack, other), before, strict=True):
        one.assert_serves(held)
    assert [a.ok for a in fleet.check()] == [True, True]
    weights = stack.weights()
    pushed = fleet.push(weights)
    assert pushed.rendezvous_s == 0
    for one in (stack, other):
        one.assert_holds(weights, pushed.version)


@pytest.mark.parametrize(
    ("phase", "what"), [("write", "engine"), ("write", "agent"), ("commit", "engine")]
)
def test_a_process_killed_in_a_push_drops_its_agent_alone_which_then_catches_up(
    phase: str, what: str, fleet: Publisher, stack: Stack, other: Stack
) -> None:
    fleet.push(stack.weights())
    killed: Daemon = getattr(other, what)
    stack.progress.hooks[phase] = killed.kill
    weights = stack.weights()
    report = fleet.push(weights)
    assert [(a.url, a.ok) for a in report.agents] == [
        (stack.agent.url, True), (other.agent.url, False),
    ]  # fmt: skip
    assert report.agents[1].phase in {"write", "commit"}
    stack.assert_holds(weights, report.version)

    killed.start()
    killed.wait_alive()
    if what == "agent":
        other.wait_for_state("torn")
    else:
        other.wait_for_state("ready")
    before = stack.status()
    outcome = fleet.catch_up(other.agent.url)
    assert (outcome.ok, outcome.version) == (True, report.version)
    other.assert_holds(weights, report.version)
    assert stack.status()["epoch"] == before["epoch"], "the other one was not asked"
    assert stack.status()["last_push"] == before["last_push"]

    weights = stack.weights()
    report = fleet.push(weights)
    assert [a.ok for a in report.agents] == [True, True]
    for one in (stack, other):
        one.assert_holds(weights, report.version)


def test_a_stopped_engine_costs_the_others_a_deadline_and_no_more(
    fleet: Publisher, stack: Stack, other: Stack
) -> None:
    fleet.push(stack.weights())
    stack.progress.hooks["begin"] = other.engine.freeze
    weights = stack.weights()
    timer = threading.Timer(60, other.engine.thaw)
    timer.start()
    try:
        report = fleet.push(weights)
    finally:
        timer.cancel()
        other.engine.thaw()
    assert [a.ok for a in report.agents] == [True, False]
    assert report.agents[1].phase == "begin"
    assert report.paused_s < QUICK.begin_s + QUICK.grace_s + 5
    stack.assert_holds(weights, report.version)
    other.wait_until_settled(30)
    report = fleet.push(weights := stack.weights())
    assert [a.ok for a in report.agents] == [True, True]
    other.assert_holds(weights, report.version)
