"""What the state machine orders, done: calls to the engines and their workers."""

from __future__ import annotations

import time

from weightsync.protocol import BeginRequest, PauseRequest
from weightsync.state import AgentState, Effect
from weightsync.state_events import (
    BeginAsked,
    CommitAsked,
    Committed,
    ConnectAsked,
    Connected,
    InitAsked,
    Outcome,
    Paused,
    Reloaded,
    Resumed,
    RolledBack,
    SessionOpened,
)
from weightsync_server.agent.cache_reset import CacheReset
from weightsync_server.agent.engines import Engines
from weightsync_server.agent.fence import Fence
from weightsync_server.agent.pushes import PushClock
from weightsync_server.agent.work import Work
from weightsync_server.agent.workers import Workers, common


class Effects:
    """Carries out one effect at a time.

    Args:
        engines, workers: Who is called.
        clock, fence: Are told of what they watch.
        clean_up_s: Seconds for calls that clean up, whose ask may be out of time.
    """

    def __init__(
        self,
        engines: Engines,
        workers: Workers,
        clock: PushClock,
        fence: Fence,
        *,
        clean_up_s: float,
    ) -> None:
        self._engines = engines
        self._workers = workers
        self._clock = clock
        self._fence = fence
        self._clean_up_s = clean_up_s
        self._cache_reset = CacheReset(lambda: engines.reset_prefix_cache(clean_up_s))

    async def perform(self, effect: Effect, work: Work, state: AgentState) -> Outcome | None:
        """Carry out one effect of what was asked; ``state`` is the one that asks for it.

        Returns:
            What it tells the state machine; None: nothing.

        Raises:
            WeightSyncError: What it failed with.
        """
        event, request = work.event, work.request
        match effect:
            case Effect.ATTACH:
                full, proof = bool(work.extra.get("by_hand")), work.extra.get("proof", "windows")
                over = state.target is not None or state.session is None
                return await self._workers.attach(
                    proof, again=full, timeout_s=work.left_s(), epoch_over=over
                )
            case Effect.PAUSE:
                push_id = work.push_id
                mode = request.mode if isinstance(request, PauseRequest) else "keep"
                if push_id is not None:
                    self._clock.paused(push_id, mode)
                # nothing but the commit comes after the pause of a push in shadow mode
                reset = state.phase == "shadowing" and self._cache_reset.wanted
                await self._engines.pause(mode, work.left_s(), reset_caches=reset)
                if reset:
                    self._cache_reset.wanted = False
                return Paused(push_id)
            case Effect.RESUME:
                await self._engines.resume(self._clean_up_s)
                return Resumed()
            case Effect.OPEN if isinstance(event, InitAsked):
                terms = (work.extra[k] for k in ("manifest", "mode"))
                work.result, before = await self._workers.layout(
                    state.epoch, event.session, *terms, timeout_s=work.left_s()
                )
                return SessionOpened(event.session, state.epoch, before)
            case Effect.CONNECT if isinstance(event, ConnectAsked):
                await self._workers.connect(work.extra["bodies"], timeout_s=work.left_s())
                self._clock.connected(work.extra["traffic"])
                self._fence.connected(work.extra["writers"])
                return Connected(event.epoch)
            case Effect.BEGIN if isinstance(event, BeginAsked):
                asked = time.monotonic()
                begun = await self._workers.begin(
                    event.epoch, event.version, event.push_id,
                    live=state.phase == "receiving", timeout_s=work.left_s(),
                )  # fmt: skip
                for worker in begun:
                    work.span("begin", asked, worker.at, worker.place)
                wanted = isinstance(request, BeginRequest) and request.reset_prefix_cache
                self._cache_reset.begin(wanted=wanted, paused=state.phase == "receiving")
                return None
            case Effect.COMMIT if isinstance(event, CommitAsked):
                if (reset_s := await self._cache_reset.finish(work.left_s())) is not None:
                    work.seconds["reset_prefix_cache"] = round(reset_s, 6)
                committed = await self._workers.commit(
                    work.extra["bodies"], event.version, timeout_s=work.left_s()
                )
                work.seconds |= work.parts(committed)
                over = any(a.body.epoch_over for a in committed)
                return Committed(event.version, over, common(a.body.rollback_to for a in committed))
            case Effect.PREPARE:
                prepared = await self._workers.prepare(
                    work.extra["bodies"], timeout_s=work.left_s()
                )
                work.seconds |= work.parts(prepared)
                return None
            case Effect.ROLLBACK if state.rollback_to is not None:
                await self._reset_prefix_cache(work)
                back = await self._workers.rollback(state.rollback_to, timeout_s=work.left_s())
                work.seconds |= work.parts(back)
                newest = max(a.body.rolled_back_from for a in back)
                return RolledBack(state.rollback_to, newest)
            case Effect.RELOAD:
                # first, as for a commit: if this fails the workers' word still is the old one
                await self._engines.reset_prefix_cache(work.left_s())
                again = await self._workers.reload(timeout_s=work.left_s())
                work.seconds |= work.parts(again)
                return Reloaded()
            case Effect.ABORT:
                self._cache_reset.drop()
                return await self._workers.abort(state.owner or "", timeout_s=self._clean_up_s)
            case _:
                await self._workers.close(timeout_s=self._clean_up_s)
                return None

    async def _reset_prefix_cache(self, work: Work) -> None:
        if not getattr(work.request, "reset_prefix_cache", False):
            return
        started = time.monotonic()
        await self._engines.reset_prefix_cache(work.left_s())
        work.seconds["reset_prefix_cache"] = round(time.monotonic() - started, 6)
        work.span("reset_prefix_cache", started, time.monotonic())
