"""A shadow that holds only a part of the weights: the rest is written while the engine stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tests.support.stack import Stack
from weightsync.errors import NoPreviousError, VerifyError

pytestmark = pytest.mark.nixl


@pytest.fixture(scope="module")
def publisher_options() -> Mapping[str, Any]:
    return {"mode": "shadow"}


@pytest.fixture(scope="module")
def agent_options() -> Sequence[str]:
    return ["--max-shadow-nbytes", "1000000"]


def test_what_has_no_shadow_is_written_in_the_pause_and_all_equals_a_fresh_load(
    stack: Stack,
) -> None:
    held = stack.held()
    weights = stack.weights()
    seen: dict[str, Any] = {}

    def before_the_pause() -> None:
        seen["dirty"] = stack.status()["workers"][0]["dirty"]
        seen["answer"] = stack.answer()

    stack.progress.phases.clear()
    stack.progress.hooks["prepare"] = before_the_pause
    report = stack.push(weights)
    session = stack.publisher._held.session
    modes = [r.mode for w in session.workers for r in w.layout.regions]
    assert set(modes) == {"shadow", "direct"}
    phases = stack.progress.phases[stack.progress.phases.index("fill") + 1 :]
    assert [p for p in phases if p] == [
        "begin", "write", "prepare", "pause", "begin", "write", "commit", "resume",
    ]  # fmt: skip
    assert seen == {"dirty": False, "answer": held.answer}
    stack.assert_holds(weights, report.version)
    # live bytes were written over: there is no way back
    assert isinstance(stack.refusal("/rollback"), NoPreviousError)


def flip(stack: Stack, mode: str) -> None:
    """A bit of what the slots hold for a region of that mode."""
    session = stack.publisher._held.session
    assert session is not None
    (worker,) = session.workers
    writes = session._plan.rounds[0].writes[worker.like]
    first = next(w for w in writes if worker.layout.regions[w.region].mode == mode)
    stack.slab()[first.slot_offset] ^= 1


def test_bytes_that_change_before_the_pause_cost_nothing(stack: Stack) -> None:
    held = stack.held()

    error = stack.failing_push(VerifyError, at="write", do=lambda: flip(stack, "shadow"))
    assert error.context["phase"] == "prepare"
    stack.assert_serves(held)
    stack.assert_a_whole_push_works()


def test_bytes_that_change_in_the_pause_tear_the_engine_and_a_push_repairs(stack: Stack) -> None:
    stack.push()

    error = stack.failing_push(VerifyError, at="pause", do=lambda: flip(stack, "direct"))
    assert error.context["phase"] == "commit"
    stack.assert_torn()
    stack.assert_a_whole_push_works()
