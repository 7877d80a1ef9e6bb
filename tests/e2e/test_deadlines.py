"""Every wait has a deadline: what stands still is named, with the phase, in good time."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.support.stack import QUICK, Daemon, Stack
from weightsync.errors import DeadlineError
from weightsync_client import Deadlines

pytestmark = pytest.mark.nixl

SHORT_S = 0.8
IDLE_S = 2.5
#: deadline, grace, the agent's own clean-up and the abort, and what two busy cores add
BOUND_S = 15.0

STEPS = ("pause_s", "begin_s", "write_s", "commit_s", "resume_s", "abort_s")
SHORT = QUICK.model_copy(update=dict.fromkeys(STEPS, SHORT_S) | {"status_s": 2.0, "grace_s": 3.0})


@pytest.fixture(scope="module")
def agent_options() -> list[str]:
    return ["--engine-timeout-s", str(SHORT_S), "--push-idle-timeout-s", str(IDLE_S)]


@pytest.fixture(scope="module")
def deadlines() -> Deadlines:
    return SHORT


def push_while_stopped(stack: Stack, process: Daemon, phase: str) -> Any:
    """The error of a push during which a process stands still (SIGSTOP) from a phase on."""
    started = time.monotonic()
    try:
        error = stack.failing_push(DeadlineError, at=phase, do=process.freeze)
        took_s = time.monotonic() - started
    finally:
        process.thaw()
    ended_in = error.context["phase"]
    # what a stopped engine's kernel or shared memory takes in is no deadline of the write
    assert ended_in == phase or (phase, ended_in) == ("write", "commit")
    assert SHORT_S <= error.context["elapsed_s"] <= took_s < BOUND_S
    assert f"failed in phase {ended_in} after" in error.__notes__[-1]
    assert error.hint or phase == "write"
    return error


# ------------------------------------------------------------------ the engine


def test_an_engine_that_stands_still_at_the_rendezvous_keeps_its_weights(stack: Stack) -> None:
    held = stack.held()
    impatient = SHORT.model_copy(update={"rendezvous_s": SHORT_S})
    with stack.new_publisher(deadlines=impatient) as publisher:
        stack.engine.freeze()
        try:
            with pytest.raises(DeadlineError) as caught:
                publisher.push(stack.weights())
        finally:
            stack.engine.thaw()
    error = caught.value
    assert error.context["phase"] == "rendezvous"
    assert error.context["elapsed_s"] < BOUND_S
    assert "worker engine0" in str(error)
    assert stack.agent.url in str(error)
    assert "nothing was written" in error.__notes__[-1]
    stack.assert_serves(held)
    stack.assert_a_whole_push_works()


def test_an_engine_that_stands_still_at_the_pause_goes_on_with_its_weights(stack: Stack) -> None:
    held = stack.held()
    error = push_while_stopped(stack, stack.engine, "pause")
    assert stack.agent.url in str(error)
    assert "nothing was written" in error.__notes__[-1]
    # it may have been paused late: the agent resumes it when the push is given up
    stack.wait_until_settled(IDLE_S + 10)
    stack.assert_serves(held)
    stack.assert_a_whole_push_works()


@pytest.mark.parametrize("phase", ["begin", "write", "commit"])
def test_an_engine_that_stands_still_after_begin_is_torn_and_repaired(
    stack: Stack, phase: str
) -> None:
    error = push_while_stopped(stack, stack.engine, phase)
    assert f"{stack.agent.url}: may be torn" in error.__notes__[-1]
    who = {
        "begin": ["worker engine0"],
        "write": ["writes to weightsync-"],
        # it may stand still before it has done what it was asked beside the writes
        "commit": ["worker engine0", "the engine did not drop its caches"],
    }
    assert any(words in str(error) for words in who[error.context["phase"]])
    stack.wait_for_state("torn")
    stack.assert_torn()
    stack.assert_a_whole_push_works()


def test_an_engine_that_stands_still_at_the_resume_serves_the_new_weights_later(
    stack: Stack,
) -> None:
    version = stack.status()["version"]
    error = push_while_stopped(stack, stack.engine, "resume")
    assert f"{stack.agent.url}: has version {version + 1}" in error.__notes__[-1]
    stack.wait_for_state("ready", timeout_s=IDLE_S + 10)
    assert stack.get(f"/readyz?min_version={version + 1}").status_code == 200
    stack.answer()
    stack.assert_a_whole_push_works()


# ------------------------------------------------------------------ the agent


def test_an_agent_that_stands_still_before_the_push_is_named(stack: Stack) -> None:
    held = stack.held()
    stack.agent.freeze()
    try:
        error = stack.failing_push(DeadlineError)
    finally:
        stack.agent.thaw()
    assert error.context["phase"] == "status"
    assert f"agent {stack.agent.url} did not answer GET /status in 2 s" in str(error)
    assert error.context["elapsed_s"] < BOUND_S
    stack.assert_serves(held)
    stack.assert_a_whole_push_works()


@pytest.mark.parametrize("phase", ["pause", pytest.param("begin", marks=pytest.mark.slow)])
def test_calls_that_an_agent_hears_late_do_not_keep_the_engine(stack: Stack, phase: str) -> None:
    held = stack.held()
    error = push_while_stopped(stack, stack.agent, phase)
    assert f"agent {stack.agent.url} did not answer POST /{phase}" in str(error)
    # the late call, and the late abort behind it in whatever order: the engine generates again, or
    # the begin was heard last and the push is given up
    stack.wait_until_settled(IDLE_S + 10)
    if stack.state == "ready":
        stack.assert_serves(held)
    else:
        stack.assert_torn()
    stack.assert_a_whole_push_works()


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["commit", "resume"])
def test_an_agent_that_stands_still_late_in_the_push_ends_whole_or_torn(
    stack: Stack, phase: str
) -> None:
    error = push_while_stopped(stack, stack.agent, phase)
    assert f"agent {stack.agent.url} did not answer POST /{phase}" in str(error)
    stack.wait_until_settled(IDLE_S + 10)
    if stack.state == "torn":
        assert phase == "commit"
        stack.assert_torn()
    stack.assert_a_whole_push_works()
