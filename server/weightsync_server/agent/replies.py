"""Where the workers' answers meet the calls that wait for them."""

from __future__ import annotations

import asyncio
import time

from weightsync.errors import EngineError, StateError, WeightSyncError, from_problem
from weightsync.protocol import WorkerReply


class PendingCall:
    """The answers of ``workers`` workers to one call, by place.

    ``complete`` is a future of all of them.
    """

    def __init__(self, workers: int) -> None:
        self.by_place: dict[str, WorkerReply] = {}
        #: when each came in (monotonic seconds)
        self.at: dict[str, float] = {}
        self.workers = workers
        self.complete: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def add(self, reply: WorkerReply) -> None:
        """Take in one answer; a repeat from the same place changes nothing."""
        first = self.by_place.setdefault(reply.place, reply)
        self.at.setdefault(reply.place, time.monotonic())
        if first.instance != reply.instance:
            # one of them would be left out of the push, and serve its old weights
            self.fail(
                EngineError(
                    f"two workers say that they are {reply.place}",
                    hint="are two engines behind one --engine-url?",
                )
            )
        elif len(self.by_place) == self.workers and not self.complete.done():
            self.complete.set_result(None)

    def fail(self, error: WeightSyncError) -> None:
        """End the wait with ``error``."""
        if not self.complete.done():
            self.complete.set_exception(error)
            self.complete.exception()  # nobody may be waiting yet; asyncio must not complain


class Replies:
    """All calls that wait.  Used on the event loop only."""

    def __init__(self) -> None:
        self._pending: dict[str, PendingCall] = {}

    def open(self, call_id: str, workers: int) -> PendingCall:
        """Begin to take the answers of so many workers to ``call_id``."""
        pending = self._pending[call_id] = PendingCall(workers)
        return pending

    def close(self, call_id: str) -> None:
        """Answers that come later are refused."""
        self._pending.pop(call_id).complete.cancel()

    def deliver(self, reply: WorkerReply) -> None:
        """Hand a worker's answer to the call that waits for it.

        Raises:
            StateError: No call of that id waits (any more).
        """
        pending = self._pending.get(reply.call_id)
        if pending is None:
            raise StateError(
                f"no call {reply.call_id} waits for an answer of {reply.place}",
                hint="the agent has given that call up; it asks again if it needs to know",
            )
        pending.add(reply)

    def fail_all(self, error: WeightSyncError) -> None:
        """End all waits: the engine is gone."""
        for pending in self._pending.values():
            pending.fail(error)


def in_order(op: str, pending: PendingCall) -> list[WorkerReply]:
    """The answers to ``op``, sorted by place.

    Raises:
        WeightSyncError: What a worker answered with.
    """
    replies = [pending.by_place[place] for place in sorted(pending.by_place)]
    if failed := [r for r in replies if r.problem is not None]:
        raise _merged(op, failed)
    return replies


def _merged(op: str, failed: list[WorkerReply]) -> WeightSyncError:
    """The first worker's error, with every worker's place; refusals of all of them together."""
    error = from_problem(failed[0].problem or {})
    context = dict(error.context) | {"phase": op, "places": [r.place for r in failed]}
    refusals = [
        {**refusal, "place": r.place}
        for r in failed
        for refusal in from_problem(r.problem or {}).context.get("refusals", [])
    ]
    if refusals:
        context["refusals"] = refusals
    context.pop("hint", None)
    return type(error)(
        f"{op}, worker {failed[0].place}: {error.message}", hint=error.hint, **context
    )
