"""Shadow mode on real processes: the engine answers all the while, and can go back."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from tests.support.cli import Run
from tests.support.stack import Stack, save
from weightsync.errors import NoPreviousError, VerifyError

pytestmark = pytest.mark.nixl


@pytest.fixture(scope="module")
def publisher_options() -> Mapping[str, Any]:
    return {"mode": "shadow"}


@contextlib.contextmanager
def asked_all_the_while(stack: Stack) -> Iterator[list[dict[str, Any]]]:
    """Completions, one after another, from another thread; all of them must be answered."""
    answers: list[dict[str, Any]] = []
    over = threading.Event()
    failed: list[Exception] = []

    def ask() -> None:
        try:
            while not over.is_set():
                answers.append(stack.answer())
        except Exception as error:
            failed.append(error)

    asker = threading.Thread(target=ask)
    asker.start()
    try:
        yield answers
    finally:
        over.set()
        asker.join(30)
    assert not failed, failed
    assert answers


def test_the_engine_answers_until_the_commit_and_then_equals_a_fresh_load(stack: Stack) -> None:
    stack.push()
    held = stack.held()
    weights = stack.weights()
    seen: dict[str, Any] = {}

    def before_the_pause() -> None:
        seen["status"] = stack.status()
        seen["ready"] = stack.get("/readyz").status_code
        seen["answer"] = stack.answer()

    stack.progress.hooks["prepare"] = before_the_pause
    with asked_all_the_while(stack):
        report = stack.push(weights)
    assert (seen["status"]["state"], seen["status"]["version"]) == ("shadowing", held.version)
    assert seen["ready"] == 200
    assert seen["answer"] == held.answer
    assert report.prepare_s > 0
    assert report.agents[0].state == "ready"
    stack.assert_holds(weights, report.version)
    assert stack.answer() != held.answer


def test_a_rollback_brings_back_the_bytes_and_the_answers_of_the_version_before(
    stack: Stack, run: Run
) -> None:
    stack.push()
    held = stack.held()
    given_up = stack.push().version
    assert stack.held().sha256 != held.sha256
    with asked_all_the_while(stack):
        done = run("rollback", stack.agent.url, "--version", given_up, "--json")
    assert done.code == 0, done.err
    assert done.json["agents"][0]["version"] == held.version
    stack.assert_serves(held)
    status = stack.status()
    assert (status["rolled_back_from"], status["rollback_to"]) == (given_up, None)
    assert isinstance(stack.refusal("/rollback"), NoPreviousError)
    again = run("rollback", stack.agent.url)
    assert again.code == 1
    assert "push the weights that you want" in again.err
    stack.assert_serves(held)
    weights = stack.weights()
    report = stack.push(weights)
    assert report.version == given_up + 1
    stack.assert_holds(weights, report.version)


def test_bytes_that_change_on_the_way_cost_nothing(stack: Stack) -> None:
    held = stack.held()

    def flip() -> None:  # the digest of the right byte has been made already
        stack.slab()[12_345] ^= 1

    with stack.events() as events, asked_all_the_while(stack):
        error = stack.failing_push(VerifyError, at="write", do=flip)
    assert error.context["phase"] == "prepare"
    assert {e["state"] for e in events if "state" in e} == {"ready", "shadowing"}
    stack.assert_serves(held)
    stack.assert_a_whole_push_works()


def test_a_trainer_that_gives_up_before_the_commit_leaves_what_was_served(stack: Stack) -> None:
    held = stack.held()

    def interrupt() -> None:
        raise KeyboardInterrupt

    for phase in ("write", "prepare", "commit"):
        with asked_all_the_while(stack):
            stack.failing_push(KeyboardInterrupt, at=phase, do=interrupt)
        stack.assert_serves(held)
    stack.assert_a_whole_push_works()


def test_verify_compares_what_serves(stack: Stack, run: Run) -> None:

    weights = stack.weights()
    stack.push(weights)
    folder = save(weights, stack.checkpoint, stack.folder / "pushed")
    other = save(stack.weights(), stack.checkpoint, stack.folder / "other")
    assert run("verify", folder, "--agent", stack.agent.url).code == 0
    assert run("verify", other, "--agent", stack.agent.url).code == 1
    # and it leaves the way back open
    assert stack.post("/rollback").json()["state"] == "ready"


def test_status_tells_what_a_shadow_needs_and_what_of_it_is_held(stack: Stack) -> None:
    stack.push()
    stack.post("/attach").raise_for_status()
    (room,) = stack.status()["workers"][0]["shadow_headroom"]
    assert room["kind"] == "DRAM"
    page = 4096  # what a slab is rounded to
    assert room["needed_nbytes"] - page <= room["held_nbytes"] <= room["needed_nbytes"]
    nbytes = sum(t.nbytes for t in stack.weights().values())
    assert nbytes <= room["needed_nbytes"] < 1.1 * nbytes
    assert room["free_nbytes"] > 0
