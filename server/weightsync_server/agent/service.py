"""The agent's heart: asks go through the state machine, its effects are carried out one by one.

One ask at a time holds the engine.  What the engine does by itself (going away) is told to the
state machine at once, so that nothing waits for an answer that cannot come.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from weightsync.errors import DeadlineError, EngineDetachedError, EngineError, WeightSyncError
from weightsync.process import Writer
from weightsync.state import AgentState, Effect, step
from weightsync.state_events import Attached, Committed, EngineLost, Event, Outcome, Resumed
from weightsync_server.agent.effects import Effects
from weightsync_server.agent.engines import Engines
from weightsync_server.agent.events import EventHub
from weightsync_server.agent.failures import failed_outcome, writes
from weightsync_server.agent.fence import Fence
from weightsync_server.agent.journal import Journal, Record, Remembered
from weightsync_server.agent.metrics import Metrics
from weightsync_server.agent.pushes import PushClock, ended_as
from weightsync_server.agent.session_guard import SessionGuard
from weightsync_server.agent.status import ErrorStatus
from weightsync_server.agent.work import Work
from weightsync_server.agent.workers import ShadowTerms, Workers

log = logging.getLogger(__name__)

#: steps that no push is part of: their times go into the metrics alone
_WITHOUT_PUSH = (Effect.ATTACH, Effect.OPEN, Effect.CONNECT)


class Service:
    """State, lock and effects of one agent.  Used on the event loop only.

    Args:
        engines: Calls to the engines, which are one to the state machine.
        hub, metrics: Where changes of state are published, and counted.
        journal_path: Where it is kept what a restart must not forget.
        engine_timeout_s: Seconds for calls that clean up, whose ask may be out of time.
        shadow: For pushes in shadow mode.
    """

    def __init__(
        self,
        engines: Engines,
        hub: EventHub,
        metrics: Metrics,
        journal_path: Path,
        *,
        engine_timeout_s: float,
        shadow: ShadowTerms,
    ) -> None:
        self.state = AgentState()
        self.engines = engines
        self.workers = Workers(engines, shadow)
        self.hub = hub
        self.metrics = metrics
        self.clock = PushClock(hub, metrics)
        self.errors: deque[ErrorStatus] = deque(maxlen=16)
        self.journal = Journal(journal_path, lambda error: self.note("journal", error))
        self.guard = SessionGuard()
        self.fence = Fence()
        self._effects = Effects(
            engines, self.workers, self.clock, self.fence, clean_up_s=engine_timeout_s
        )
        self._turn = asyncio.Lock()
        self._holder = ""
        self._touched = time.monotonic()
        metrics.show(self.state, 0)

    def recall(self) -> None:
        """Take the journal, and go on from what it tells; before anything else is asked.

        Raises:
            InputError: Another agent has it.
        """
        self.journal.open()
        record = self.journal.record
        # what it was, its workers tell: a restart of the agent is no more than a blink of theirs
        self.state = replace(record.state, phase="detached")
        self.workers.instances = dict(record.instances)
        if record.session_owner and self.state.session is not None:
            self.guard.recall(self.state.session, record.session_owner)
        self.fence.recall(record.writers, record.fenced)
        if record.state.owner is not None and writes(record.state):
            self.fence.ended(record.state.owner)
        self.metrics.show(self.state, 0)

    def release(self, push_id: str, writer: Writer) -> None:
        """A writing process has nothing of that push left."""
        self.fence.released(push_id, writer)
        self.journal.save_soon(self._record(self.state))

    def remember(self, push_id: str, call: str, answer: Remembered) -> None:
        """Keep an answer for repeats that come after a restart."""
        self.journal.save_soon(self.journal.record.with_answer(push_id, call, answer))

    @property
    def idle_s(self) -> float:
        """Seconds since the push that holds the engine was last heard of; 0 while a call runs."""
        return 0.0 if self._turn.locked() else time.monotonic() - self._touched

    def touch(self, push_id: str) -> None:
        """The push has been heard of."""
        if push_id == self.state.owner:
            self._touched = time.monotonic()

    async def run(self, work: Work) -> None:
        """Carry an ask out, all of it.

        Raises:
            StateError: It is illegal now; nothing changed.
            DeadlineError: Its time was over before its turn came, or an effect took too long.
            WeightSyncError: What an effect failed with; the state tells what that left behind.
        """
        step(self.state, work.event)  # refused at once, not after waiting for another's call
        async with self._held(work):
            await self._write_down(work)
            queue = deque(self._apply(work.event))
            failure: WeightSyncError | None = None
            while queue:
                work.begun()
                effect = queue.popleft()
                outcome, error = await self._attempt(effect, work)
                if error is not None and effect is not Effect.CLOSE:
                    failure = failure or error
                if outcome is not None:
                    queue.extend(self._apply(outcome))
                if self.state.phase == "detached":
                    break  # what was still to do was meant for an engine that is gone
            if failure is not None:
                raise failure
            if self.state.phase == "detached":
                raise EngineDetachedError(
                    "the engine went away meanwhile", hint="GET /status tells when it is back"
                )

    def lose_engine(self, why: str) -> None:
        """The engine is gone: whatever waits for it ends now."""
        if self.state.phase == "detached":
            return
        log.warning("engine lost: %s", why)
        self.metrics.lost.inc()
        self._apply(EngineLost())
        self.engines.close_soon(why)

    def note(self, what: str, error: WeightSyncError) -> None:
        """Remember an error for ``/status``, tell listeners and the log."""
        self.metrics.errors.labels(error.code).inc()
        entry = ErrorStatus(
            at=time.time(), what=what, code=error.code, detail=error.message, hint=error.hint
        )
        if self.errors and self.errors[-1].model_copy(update={"at": entry.at}) == entry:
            self.errors[-1] = entry  # the same again, as while an engine is away: no news
            return
        log.warning("%s: %s", what, error)
        self.errors.append(entry)
        self.hub.publish("error", entry.model_dump())

    @contextlib.asynccontextmanager
    async def _held(self, work: Work) -> AsyncIterator[None]:
        name = type(work.event).__name__
        try:
            async with asyncio.timeout(work.left_s()):
                await self._turn.acquire()
        except TimeoutError as error:
            raise DeadlineError(
                f"{name} waited in vain for {self._holder} to end",
                hint="ask again later",
                phase=name,
            ) from error
        self._holder = name
        try:
            yield
        finally:
            self._touched = time.monotonic()
            self._turn.release()

    async def _write_down(self, work: Work) -> None:
        """Before a push, or an epoch, begins to matter to the engine it is in the journal.

        Raises:
            StateError: The ask is illegal now.
            JournalError: It is not in the journal; nothing changed.
        """
        state, effects = step(self.state, work.event)
        # of a push in shadow mode it was written down at its begin: not while requests wait
        begun = self.state.phase == "shadowing"
        pauses = Effect.PAUSE in effects and work.push_id is not None and not begun
        if pauses or Effect.OPEN in effects or Effect.BEGIN in effects:
            # whose pause it is has to be known even if nobody is left to hear that it worked
            intended = replace(state, owner=state.owner or work.push_id)
            await self.journal.save(self._record(intended))

    def _guard_memory(self, before: AgentState, event: Event) -> None:
        if isinstance(event, Attached) and not event.same:
            self.fence.clear()
        elif isinstance(event, Committed):
            pass  # every write had completed, and the epoch goes on
        elif before.owner is not None and writes(before) and not writes(self.state):
            self.fence.ended(before.owner)

    def _record(self, state: AgentState) -> Record:
        return self.journal.record.model_copy(
            update={
                "state": state,
                "session_owner": self.guard.owner(state.session),
                "instances": self.workers.instances,
                "writers": self.fence.writers,
                "fenced": self.fence.record(),
            }
        )

    def _apply(self, event: Event) -> tuple[Effect, ...]:
        before = self.state
        self.state, effects = step(before, event)
        if self.state != before:
            self._guard_memory(before, event)
            self._tell(before, event)
            self.journal.save_soon(self._record(self.state))
        return effects

    def _tell(self, before: AgentState, event: Event) -> None:
        state, cause = self.state, type(event).__name__
        self.metrics.show(state, len(self.workers.status))
        self.hub.publish("state", self.snapshot() | {"cause": cause})
        if state.phase != before.phase:
            text = "%s(v%d) -> %s(v%d) by %s"
            log.info(text, before.phase, before.version, state.phase, state.version, cause)
        if outcome := ended_as(before, state, event):
            self.clock.end(outcome, state, list(self.workers.instances))

    def snapshot(self) -> dict[str, Any]:
        """The state as ``/events`` tells it."""
        state = self.state
        return {
            "at": time.time(),
            "state": state.phase,
            "version": state.version,
            "target": state.target,
            "epoch": state.epoch,
            "session": state.session,
            "pause_owner": state.owner,
        }

    # -------------------------------------------------------------- effects

    async def _attempt(
        self, effect: Effect, work: Work
    ) -> tuple[Outcome | None, WeightSyncError | None]:
        started = time.monotonic()
        error: WeightSyncError | None = None
        outcome: Outcome | None
        if effect in (Effect.PAUSE, Effect.BEGIN) and work.push_id is not None:
            self.clock.opened(work.push_id)
        self.clock.starts(effect.value, work.push_id, getattr(work.event, "version", None))
        try:
            outcome = await self._effects.perform(effect, work, self.state)
        except WeightSyncError as failed:
            error = failed
        except Exception as failed:
            log.exception("%s failed", effect.value)
            error = EngineError(
                f"{effect.value} failed: {type(failed).__name__}: {failed}",
                hint="this is an error in the agent; its log has the traceback",
            )
        if error is not None:
            self.note(effect.value, error)
            if isinstance(error, EngineDetachedError) and effect is not Effect.ATTACH:
                self.lose_engine(error.message)
            outcome = failed_outcome(effect, work, error)
        seconds = time.monotonic() - started
        work.seconds[effect.value] = round(seconds, 6)
        work.span(effect.value, started, started + seconds)
        self.clock.ends(effect.value, work.push_id, ok=error is None)
        if error is None and effect in _WITHOUT_PUSH:
            self.metrics.seconds.labels(effect.value).observe(seconds)
        if error is None and effect is Effect.BEGIN:
            self.clock.starts("write", work.push_id)
        if isinstance(outcome, Resumed):
            self.clock.resumed(work.push_id)
        return outcome, error
