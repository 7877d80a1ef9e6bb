"""Something is done at a moment of a push, and the push is seen through to its end."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.support.stack import QUICK, TOKEN, Stack, Weights, ask_apart, wait_until
from weightsync.errors import WeightSyncError
from weightsync.protocol import PushMode
from weightsync_client import Publisher
from weightsync_client.report import PushReport
from weightsync_client.slots import Slots
from weightsync_client.source import WeightSource

#: of one control call; the agent's own calls; a push that is silent for so long is given up
STEP_S = 1.0
IDLE_S = 2.5
DEADLINES = QUICK.model_copy(
    update=dict.fromkeys(
        ("pause_s", "begin_s", "write_s", "commit_s", "resume_s", "abort_s"), STEP_S
    )
    | {"status_s": 2.0, "grace_s": 3.0}
)

#: deadlines, the agent's own clean-up, the idle timeout, two busy cores; an engine that starts
BOUND_S = 30.0
START_S = 30.0

#: how long a step that is struck in its middle is held open by a stopped engine
_OPEN_S = 0.4


@dataclass(frozen=True)
class Struck:
    """How a push ended at which something was done; ``report`` or ``error`` is None."""

    weights: Weights
    report: PushReport | None
    error: WeightSyncError | None
    took_s: float

    @property
    def how(self) -> str:
        """The error's class, or "done"."""
        return "done" if self.error is None else type(self.error).__name__


def strike(
    stack: Stack,
    when: str,
    do: Callable[[], object],
    *,
    through: str | None = None,
    mode: PushMode = "direct",
) -> Struck:
    """Push new weights from this process, and do something at a moment of it.

    ``when``: at the start of a phase; ``mid-write``: between two rounds of writes; ``in PHASE``:
    while the engine works on that phase's call, which the agent waits for.  ``through``: another
    address of the agent.
    """
    weights = stack.weights()
    done = threading.Event()

    def now() -> None:
        done.set()
        do()

    with _armed(stack, when, now), contextlib.ExitStack() as owned:
        publisher = stack.publisher
        if through is not None or when == "mid-write" or mode != "direct":
            bound = sum(t.nbytes for t in weights.values()) // 4
            publisher = owned.enter_context(
                Publisher(
                    [through or stack.agent.url],
                    token=TOKEN,
                    deadlines=stack.deadlines,
                    progress=stack.progress,
                    mode=mode,
                    max_slot_bytes=bound if when == "mid-write" else None,
                )
            )
            ask_apart(publisher)
        started = time.monotonic()
        report, error = None, None
        try:
            report = publisher.push(weights)
        except WeightSyncError as failed:
            error = failed
        took_s = time.monotonic() - started
    assert done.wait(5), f"the push never came to {when}"
    return Struck(weights, report, error, took_s)


@contextlib.contextmanager
def _armed(stack: Stack, when: str, do: Callable[[], object]) -> Iterator[None]:
    timer: list[threading.Timer] = []

    def in_the_middle() -> None:
        stack.engine.freeze()

        def hit() -> None:
            do()
            if stack.engine.runs:
                stack.engine.thaw()

        timer.append(threading.Timer(_OPEN_S, hit))
        timer[0].start()

    with pytest.MonkeyPatch.context() as patch:
        if when == "mid-write":
            refill = Slots.refill

            def struck_refill(slots: Slots, source: WeightSource, number: int) -> None:
                if number == 3:
                    do()
                refill(slots, source, number)

            patch.setattr(Slots, "refill", struck_refill)
        elif when.startswith("in "):
            stack.progress.hooks[when.removeprefix("in ")] = in_the_middle
        else:
            stack.progress.hooks[when] = do
        try:
            yield
        finally:
            stack.progress.hooks.clear()
            for each in timer:
                each.join(10)


def settled(stack: Stack) -> str:
    """The agent's state once nothing moves any more."""
    seen: list[str] = []

    def calm() -> bool:
        status = stack.status()
        state = str(status["state"])
        still = state in ("ready", "torn") or (state == "paused" and status["pause_owner"] is None)
        seen.append(state if still else "")
        return len(seen) > 15 and set(seen[-15:]) == {state}

    wait_until(calm, "nothing moves", BOUND_S)
    return seen[-1]


def what_is_served(stack: Stack, state: str, before: int) -> str:
    """The end state in the words of a row."""
    if state != "ready":
        return state
    version = stack.status()["version"]
    return {0: "started", before: "old"}.get(version, "new")
