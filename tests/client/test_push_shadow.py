"""Pushes in shadow mode, as agents see them: the order of the calls, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import Agent
from torch import nn

from weightsync import protocol as p
from weightsync import state as st
from weightsync.codec import unpack
from weightsync.errors import EngineError, InputError, NoPreviousError, VerifyError
from weightsync.layout import KernelRegion, WorkerLayout
from weightsync.state_events import (
    Aborted,
    BeginAsked,
    CommitAsked,
    Committed,
    PrepareAsked,
    RollbackAsked,
    RolledBack,
)
from weightsync_client import Publisher

Make = Callable[..., Publisher]


class ShadowAgent(Agent):
    """Its workers' regions are shadows; ``served`` is what its engine computes with."""

    mode = "shadow"
    torn_in_commit = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.served: dict[str, torch.Tensor] = {}
        self.before_that: dict[str, torch.Tensor] = {}

    def init_transfer(self, body: dict[str, Any]) -> p.InitTransferResponse:
        assert body.get("mode") == "shadow"
        worker = self.workers[0]
        lay_out, mode = type(worker).lay_out, self.mode

        def shadowed(*args: Any) -> WorkerLayout:
            made = lay_out(worker, *args)
            regions = tuple(
                KernelRegion(r.name, r.dtype, r.shape, r.nbytes, mode, r.addr) for r in made.regions
            )
            return WorkerLayout(made.place, regions, made.records, made.skipped)

        worker.lay_out = shadowed  # type: ignore[method-assign]
        return super().init_transfer(body)

    def begin_update(self, body: dict[str, Any]) -> p.StepResponse:
        ask = p.BeginRequest.model_validate(body)
        shadow = ask.mode == "shadow"
        return self._ask(BeginAsked(ask.session, ask.epoch, ask.push_id, ask.version, shadow))

    def prepare_commit(self, body: dict[str, Any]) -> p.StepResponse:
        ask = p.PrepareRequest.model_validate(body)
        assert self.generating or self.state.phase == "receiving"
        event = PrepareAsked(ask.session, ask.epoch, ask.push_id, ask.version)
        self.state, _ = st.step(self.state, event)
        expected = {r.rank: unpack(r.digests[0], list[bytes]) for r in ask.ranks}
        try:
            self.workers[0].commit(ask.epoch, ask.version, expected)
        except VerifyError:
            left = Aborted(frozenset({self.state.version}), dirty=False)
            self.state = st.step(self.state, left).state
            raise
        return self._reply()

    def commit_update(self, body: dict[str, Any]) -> p.StepResponse:
        ask = p.CommitRequest.model_validate(body)
        assert not self.generating
        event = CommitAsked(ask.session, ask.epoch, ask.push_id, ask.version)
        self.state, _ = st.step(self.state, event)
        self.before_that = self.served
        self.served = {name: b.clone() for name, b in self.workers[0].buffers.items()}
        if self.torn_in_commit:
            left = Aborted(frozenset({self.state.version}), True, self.state.version)
            self.state = st.step(self.state, left).state
            raise EngineError("out of luck")
        outcome = Committed(ask.version, rollback_to=self.state.version)
        self.state = st.step(self.state, outcome).state
        return self._reply()

    def rollback(self, body: dict[str, Any]) -> p.StepResponse:
        ask = p.RollbackRequest.model_validate(body)
        st.check_rollback(self.state, ask.version)
        given_up, to = self.state.version, self.state.rollback_to
        self.state, _ = st.step(self.state, RollbackAsked(str(ask.push_id)))
        self.served = self.before_that
        self.state, _ = st.step(self.state, RolledBack(to, given_up))
        return self.resume({"push_id": ask.push_id})


@pytest.fixture
def make_shadow(fabric) -> Any:
    made: list[ShadowAgent] = []

    def make() -> ShadowAgent:
        made.append(ShadowAgent(fabric))
        return made[-1]

    yield make
    for agent in made:
        agent.close()


def holds(agent: ShadowAgent, model: nn.Module) -> bool:
    return all(
        torch.equal(agent.served[name].view(t.dtype).view(t.shape), t)
        for name, t in model.state_dict().items()
        if name in agent.served
    )


def changed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for t in model.parameters():
            t.add_(1)
    return model


def test_the_engine_is_paused_only_after_everything_was_written_and_checked(
    make_shadow, make_publisher: Make, model: nn.Module
) -> None:
    agent = make_shadow()
    publisher = make_publisher(agent, mode="shadow")
    for version in (1, 2):
        agent.calls.clear()
        report = publisher.push(changed(model))
        assert report.version == version
        assert holds(agent, model)
        rendezvous = ["/init_transfer", "/connect"] * (version == 1)
        assert agent.calls == [
            "/status", *rendezvous, "/begin_update", "/prepare_commit", "/pause", "/commit_update",
            "/resume",
        ]  # fmt: skip
        assert agent.bodies["/commit_update"]["ranks"] == []
        assert report.prepare_s > 0
        assert report.paused_s < report.total_s - report.write_s - report.prepare_s
    assert agent.state.phase == "ready"


def test_wrong_bytes_fail_the_push_and_never_stop_the_engine(
    make_shadow, make_publisher: Make, model: nn.Module
) -> None:
    agent = make_shadow()
    publisher = make_publisher(agent, mode="shadow")
    publisher.push(model)
    written = next(iter(agent.workers[0].buffers.values()))
    agent.before["/prepare_commit"] = written.zero_
    with pytest.raises(VerifyError) as caught:
        publisher.push(changed(model))
    assert caught.value.context["phase"] == "prepare"
    assert caught.value.context["agents"] == [f"{agent.url}: serves what it served"]
    assert agent.state.phase == "ready"
    assert "/pause" not in agent.calls[agent.calls.index("/resume") :]
    del agent.before["/prepare_commit"]
    publisher.push(model)
    assert holds(agent, model)


def test_agents_that_have_committed_go_back_when_another_cannot(
    make_shadow, make_publisher: Make, model: nn.Module
) -> None:
    agents = [make_shadow() for _ in range(3)]
    publisher = make_publisher(*agents, mode="shadow")
    publisher.push(model)
    old = [dict(agent.served) for agent in agents]
    agents[1].torn_in_commit = True
    with pytest.raises(EngineError, match="out of luck") as caught:
        publisher.push(changed(model))
    assert "goes back to the version before" in str(caught.value.context["agents"])
    for agent, served in zip(agents, old, strict=True):
        if agent is agents[1]:
            assert (agent.state.phase, agent.state.rollback_to) == ("torn", 1)
            continue
        assert (agent.state.phase, agent.state.version) == ("ready", 1)
        assert agent.generating
        assert all(torch.equal(agent.served[k], served[k]) for k in served)
        assert agent.calls[-1] == "/rollback"
    agents[1].torn_in_commit = False
    report = publisher.push(model)
    assert report.version == 3
    assert all(holds(agent, model) for agent in agents)
    # the torn one was made sure to stand still before anything was written
    calls = agents[1].calls[agents[1].calls.index("/connect", -12) :]
    assert calls.index("/pause") < calls.index("/prepare_commit")


def test_an_agent_with_nothing_to_go_back_to_keeps_the_whole_version(
    make_shadow, make_publisher: Make, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    agents = [make_shadow() for _ in range(2)]
    publisher = make_publisher(*agents, mode="shadow")

    def refused() -> None:
        raise NoPreviousError("nothing is kept")

    agents[0].before["/rollback"] = refused
    agents[1].torn_in_commit = True
    with pytest.raises(EngineError):
        publisher.push(model)
    assert (agents[0].state.phase, agents[0].state.version) == ("ready", 1)


def test_regions_that_have_no_shadow_make_the_push_a_direct_one(
    make_shadow, make_publisher: Make, model: nn.Module
) -> None:
    agent = make_shadow()
    agent.mode = "direct"
    publisher = make_publisher(agent, mode="shadow")

    def stop() -> None:
        raise VerifyError("seen enough")

    agent.before["/commit_update"] = stop
    with pytest.raises(VerifyError, match="seen enough"):
        publisher.push(model)
    assert agent.calls.index("/pause") < agent.calls.index("/begin_update")
    assert "/prepare_commit" not in agent.calls


def test_an_agent_that_catches_up_does_so_in_shadow_mode(
    make_shadow, make_publisher: Make, model: nn.Module
) -> None:
    there, late = make_shadow(), make_shadow()
    publisher = make_publisher(there, late, mode="shadow", policy="available")

    def not_yet() -> None:
        raise EngineError("still starting")

    late.before["/init_transfer"] = not_yet
    report = publisher.push(model)
    assert [agent.ok for agent in report.agents] == [True, False]
    del late.before["/init_transfer"]
    late.calls.clear()
    assert publisher.catch_up(late.url).version == 1
    assert holds(late, model)
    assert late.calls.index("/prepare_commit") < late.calls.index("/pause")
    assert publisher.push(changed(model)).version == 2
    assert holds(there, model)
    assert holds(late, model)


def test_an_unknown_mode_is_refused(make_publisher: Make) -> None:
    with pytest.raises(InputError, match="unknown mode 'shade'"):
        make_publisher("http://127.0.0.1:1", mode="shade")
