"""Pushes at the wrong moment: to a paused, torn or detached engine, and two at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.stack import TOKEN, Stack, environ, save
from tests.support.trainer import trainer_held_at
from weightsync.errors import (
    EngineDetachedError,
    EnginePausedError,
    PushInProgressError,
    VerifyError,
)

pytestmark = pytest.mark.nixl


def test_a_push_to_an_engine_paused_by_hand_leaves_it_paused_with_its_weights(
    stack: Stack,
) -> None:
    held = stack.held()
    assert stack.post("/pause").json()["state"] == "paused"
    error = stack.failing_push(EnginePausedError)
    assert error.context["phase"] == "pause"
    assert "paused by hand" in str(error)
    assert "POST /resume" in error.hint
    status = stack.status()
    assert (status["state"], status["pause_owner"]) == ("paused", None)
    assert stack.get("/readyz").json()["code"] == "illegal_state"
    assert stack.get("/checksums").json()["sha256"] == held.sha256
    assert stack.post("/resume").json()["state"] == "ready"
    stack.assert_serves(held)
    stack.assert_a_whole_push_works()


def test_bytes_that_change_on_the_way_tear_the_engine_and_a_push_to_it_repairs(
    stack: Stack,
) -> None:
    def flip() -> None:  # the digest of the right byte has been made already
        stack.slab()[12_345] ^= 1

    error = stack.failing_push(VerifyError, at="write", do=flip)
    assert error.context["phase"] == "commit"
    assert "1 of " in str(error)
    assert error.context["tensor"] in str(error)
    assert "push again" in error.hint
    assert f"{stack.agent.url}: may be torn" in error.__notes__[-1]
    stack.assert_torn()
    assert stack.last_error()["code"] == "verify_failed"
    with stack.events() as events:
        stack.assert_a_whole_push_works()
    states = [e["state"] for e in events if "state" in e]
    assert "paused" not in states[: states.index("receiving")], "a torn engine was called paused"


def test_a_torn_engine_takes_a_push_of_another_trainer(stack: Stack) -> None:
    version = stack.status()["version"]
    stack.failing_push(VerifyError, at="write", do=lambda: stack.slab()[0].bitwise_xor_(1))
    stack.assert_torn()
    with stack.new_publisher() as other:
        weights = stack.weights()
        report = other.push(weights)
        # the interrupted version is not given out a second time to other weights
        assert report.version > version + 1
        stack.assert_holds(weights, report.version)
    stack.assert_a_whole_push_works()


def test_a_push_to_a_detached_engine_is_refused_until_the_engine_is_there(stack: Stack) -> None:
    stack.engine.stop()
    stack.wait_for_state("detached")
    error = stack.failing_push(EngineDetachedError)
    assert error.context["phase"] in {"rendezvous", "pause"}
    assert "has no engine" in str(error)
    assert "/status" in error.hint
    assert stack.get("/readyz").json()["code"] == "engine_detached"
    assert stack.engine.url in stack.last_error()["detail"]
    stack.engine.start()
    stack.wait_for_state("ready", timeout_s=40)
    stack.assert_a_whole_push_works()


def test_a_second_push_while_one_runs_is_refused_and_the_first_one_ends_well(
    stack: Stack, tmp_path: Path
) -> None:
    weights = stack.weights()
    folder = save(weights, stack.checkpoint, tmp_path / "first")
    with trainer_held_at(
        "write",
        agent=stack.agent.url,
        token=TOKEN,
        weights=folder / "model.safetensors",
        env=environ(),
        log=stack.folder / "trainer.log",
    ) as first:
        before = stack.status()
        assert before["state"] == "receiving"
        error = stack.failing_push(PushInProgressError)
        assert before["pause_owner"] in str(error)
        assert "wait for it" in error.hint
        assert error.context["push_id"].startswith("p-")
        after = stack.status()
        for key in ("state", "version", "target", "epoch", "session", "pause_owner"):
            assert after[key] == before[key], key
        assert first.go_on() == {"done": before["target"]}
    stack.assert_holds(weights, before["target"])
    stack.assert_a_whole_push_works()
