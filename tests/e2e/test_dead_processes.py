"""Trainer, engine or agent dies in mid-push: the engine never serves half of anything."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest

from tests.support.stack import TOKEN, Stack, environ, save
from tests.support.trainer import Trainer, trainer_held_at
from weightsync.errors import (
    AgentUnreachableError,
    EngineDetachedError,
    FencePendingError,
    StateError,
    TransportError,
    WeightSyncError,
)
from weightsync_client.slots import Slots
from weightsync_client.source import WeightSource

pytestmark = pytest.mark.nixl

IDLE_S = 1.5


@pytest.fixture(scope="module")
def agent_options() -> list[str]:
    return ["--push-idle-timeout-s", str(IDLE_S)]


@pytest.fixture
def trainer_at(stack: Stack, tmp_path: Path) -> Callable[[str], AbstractContextManager[Trainer]]:
    folder = save(stack.weights(), stack.checkpoint, tmp_path / "dying")

    def start(phase: str) -> AbstractContextManager[Trainer]:
        return trainer_held_at(
            phase,
            agent=stack.agent.url,
            token=TOKEN,
            weights=folder / "model.safetensors",
            env=environ(),
            log=stack.folder / "trainer.log",
        )

    return start


TrainerAt = Callable[[str], AbstractContextManager[Trainer]]


# ------------------------------------------------------------------ the trainer


def test_a_trainer_killed_after_begin_leaves_a_torn_engine_that_a_whole_push_repairs(
    stack: Stack, trainer_at: TrainerAt
) -> None:
    with trainer_at("write") as trainer:
        push = stack.status()["pause_owner"]
        trainer.kill()
        stack.wait_for_state("torn", timeout_s=IDLE_S + 10)
    stack.assert_torn()
    error = next(e for e in stack.status()["last_errors"] if push in e["detail"])
    assert error["code"] == "deadline_exceeded"
    assert f"not heard of for {IDLE_S:g} s while the engine was receiving" in error["detail"]
    stack.assert_a_whole_push_works()


@pytest.mark.slow
def test_a_trainer_killed_between_write_and_commit_leaves_a_torn_engine(
    stack: Stack, trainer_at: TrainerAt
) -> None:
    with trainer_at("commit") as trainer:
        trainer.kill()
        stack.wait_for_state("torn", timeout_s=IDLE_S + 10)
    stack.assert_torn()
    stack.assert_a_whole_push_works()


def test_a_trainer_killed_before_begin_costs_nothing(stack: Stack, trainer_at: TrainerAt) -> None:
    held = stack.held()
    with trainer_at("begin") as trainer:
        assert stack.state == "paused"
        trainer.kill()
        stack.wait_for_state("ready", timeout_s=IDLE_S + 10)
    assert "while the engine was paused: given up" in stack.last_error()["detail"]
    stack.assert_serves(held)
    stack.assert_a_whole_push_works()


def test_ctrl_c_in_mid_push_aborts_at_once_and_the_next_push_repairs(
    stack: Stack, trainer_at: TrainerAt
) -> None:
    with trainer_at("write") as trainer:
        assert trainer.interrupt() != 0
        assert stack.state == "torn"  # told by the trainer, not found out by the idle deadline
    stack.assert_torn()
    assert stack.status()["last_push"]["outcome"] == "torn"
    stack.assert_a_whole_push_works()


@pytest.mark.slow
def test_ctrl_c_before_begin_gives_the_engine_back(stack: Stack, trainer_at: TrainerAt) -> None:
    held = stack.held()
    with trainer_at("begin") as trainer:
        assert trainer.interrupt() != 0
        stack.assert_serves(held)
    stack.assert_a_whole_push_works()


def test_a_trainer_that_was_given_up_keeps_others_out_until_it_has_said_that_it_stopped(
    stack: Stack, trainer_at: TrainerAt
) -> None:
    with trainer_at("write") as trainer:
        stack.wait_for_state("torn", timeout_s=IDLE_S + 10)
        refused = stack.failing_push(FencePendingError)
        assert refused.context["pids"] == [trainer.pid]
        stack.assert_torn()
        told = trainer.go_on()
        # it asked before it wrote
        assert (told["error"], told["phase"]) == ("StaleEpochError", "write"), told
        assert "has given push" in told["message"]
        stack.assert_a_whole_push_works()


def test_a_trainer_frozen_inside_its_write_writes_late_and_is_fenced_off_till_then(
    stack: Stack, trainer_at: TrainerAt
) -> None:
    with trainer_at("in post") as trainer:
        stack.wait_for_state("torn", timeout_s=IDLE_S + 10)
        before = stack.get("/checksums").json()["sha256"]
        refused = stack.failing_push(FencePendingError)
        assert f"kill -9 {trainer.pid} on " in refused.hint
        trainer.thaw()
        told = [trainer.read()]
        while "error" not in told[-1]:
            told.append(trainer.read())
        landed = stack.get("/checksums").json()["sha256"] != before
        stack.assert_torn()
        stack.assert_a_whole_push_works()
    if not landed:
        pytest.skip("this host's kernel lets no process into another's memory")
    # the worker's deregistration did not keep its bytes out: only the wait of others did


def test_a_trainer_frozen_inside_its_write_and_ended_is_waited_for_no_longer(
    stack: Stack, trainer_at: TrainerAt
) -> None:
    with trainer_at("in post") as trainer:
        stack.wait_for_state("torn", timeout_s=IDLE_S + 10)
        stack.agent.kill()  # the journal knows whom to wait for
        stack.agent.start()
        stack.wait_for_state("torn")
        stack.failing_push(FencePendingError)
        trainer.kill()
        stack.assert_a_whole_push_works()


# ------------------------------------------------------------------ the engine


@pytest.mark.parametrize("phase", ["write", pytest.param("commit", marks=pytest.mark.slow)])
def test_an_engine_killed_in_mid_push_is_a_clear_error_and_its_restart_is_joined(
    stack: Stack, phase: str
) -> None:
    before = stack.status()["workers"][0]["instance"]
    with stack.events() as events:
        error = stack.failing_push(WeightSyncError, at=phase, do=stack.engine.kill)
        assert isinstance(error, TransportError | EngineDetachedError), repr(error)
        assert error.context["phase"] in {"write", "commit"}
        assert error.context["elapsed_s"] < 10
        stack.wait_for_state("detached")
        assert stack.get("/readyz").json()["code"] == "engine_detached"
        stack.engine.start()
        stack.wait_for_state("ready", timeout_s=40)
    stack.engine.wait_alive()
    after = stack.status()
    assert after["workers"][0]["instance"] != before
    assert after["session"] is None
    states = [e["state"] for e in events if "state" in e]
    assert states[-2:] == ["detached", "ready"]
    assert events[-1]["cause"] == "Attached"
    stack.assert_a_whole_push_works()


def test_an_engine_killed_between_two_rounds_ends_the_push_and_the_next_goes_in_rounds_again(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = stack.weights()
    bound = sum(t.nbytes for t in weights.values()) // 4
    refill = Slots.refill

    def kill_and_refill(slots: Slots, source: WeightSource, number: int) -> None:
        if number == 3:
            stack.engine.kill()
        refill(slots, source, number)

    with stack.new_publisher(max_slot_bytes=bound) as publisher:
        report = publisher.push(weights)
        assert report.rounds > 4
        stack.assert_holds(weights, report.version)
        monkeypatch.setattr(Slots, "refill", kill_and_refill)
        with pytest.raises(WeightSyncError) as caught:
            publisher.push(weights)
        monkeypatch.undo()
        assert isinstance(caught.value, TransportError | EngineDetachedError), repr(caught.value)
        assert caught.value.context["phase"] in {"write", "commit"}
        stack.wait_for_state("detached")
        stack.engine.start()
        stack.wait_for_state("ready", timeout_s=40)
        stack.engine.wait_alive()
        weights = stack.weights()
        report = publisher.push(weights)
        assert report.rounds > 4
        stack.assert_holds(weights, report.version)


# ------------------------------------------------------------------ the agent


def test_an_agent_killed_in_mid_push_finds_the_torn_engine_when_it_is_back(stack: Stack) -> None:
    error = stack.failing_push(AgentUnreachableError, at="write", do=stack.agent.kill)
    assert error.context["phase"] == "commit"
    assert stack.agent.url in str(error)
    assert "start weightsync-agent there" in error.hint
    with pytest.raises(httpx.ReadTimeout):  # it was paused and stays so, with no agent about
        stack.answer(timeout_s=0.3)
    stack.agent.start()
    stack.wait_for_state("torn")
    stack.assert_torn()
    stack.assert_a_whole_push_works()


def test_an_agent_restarted_in_mid_push_refuses_the_commit_of_a_push_it_does_not_know(
    stack: Stack,
) -> None:
    def restart() -> None:
        stack.agent.kill()
        stack.agent.start()
        stack.wait_for_state("torn")

    error = stack.failing_push(StateError, at="commit", do=restart)
    assert error.context["phase"] == "commit"
    assert error.code in {"engine_torn", "stale_epoch", "no_session"}
    stack.assert_torn()
    stack.assert_a_whole_push_works()


def test_an_agent_killed_before_begin_knows_the_dead_push_when_it_is_back_and_ends_its_pause(
    stack: Stack,
) -> None:
    held = stack.held()
    error = stack.failing_push(AgentUnreachableError, at="begin", do=stack.agent.kill)
    assert error.context["phase"] == "begin"
    stack.agent.start()
    stack.wait_for_state("paused")
    assert stack.status()["pause_owner"] == error.context["push_id"]
    stack.wait_for_state("ready", timeout_s=IDLE_S + 10)
    stack.assert_serves(held)
    stack.assert_a_whole_push_works()


def test_an_agent_killed_after_commit_gives_its_answer_again(stack: Stack) -> None:
    seen: list[dict[str, object]] = []

    def kill() -> None:
        seen.append(stack.status()["last_push"])
        stack.agent.kill()
        stack.agent.start()
        stack.wait_for_state("paused")

    weights = stack.weights()
    stack.progress.hooks["resume"] = kill
    report = stack.push(weights)  # the new agent resumes what the old one had paused
    assert seen[0]["push_id"] == report.push_id
    status = stack.status()
    assert (status["committed"], status["committed_by"]) == (report.version, report.push_id)
    stack.assert_holds(weights, report.version)
    stack.assert_a_whole_push_works()
