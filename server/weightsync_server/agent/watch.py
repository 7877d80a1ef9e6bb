"""What the agent does unasked: it looks after its engines, and gives up pushes that fell silent."""

from __future__ import annotations

import asyncio
import logging
import time

from weightsync.errors import DeadlineError, EngineDetachedError, WeightSyncError
from weightsync.state_events import AbortAsked, AttachAsked
from weightsync_server.agent.service import Service
from weightsync_server.agent.settings import AgentSettings
from weightsync_server.agent.work import Work

log = logging.getLogger(__name__)

#: seconds between two tries to write a journal that could not be written
_JOURNAL_RETRY_S = 10.0
#: looks at the engine that may fail in a row before it counts as gone; a refused connection
#: counts at once
_MAX_SILENT = 3


class Watch:
    """Three loops; ``run`` never returns by itself.

    Args:
        service: What is looked after.
        settings: How often, and with which deadlines.
    """

    def __init__(self, service: Service, settings: AgentSettings) -> None:
        self._service = service
        self._settings = settings

    async def run(self) -> None:
        """All loops, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._engine())
            group.create_task(self._pushes())
            group.create_task(self._journal())

    async def _engine(self) -> None:
        settings = self._settings
        backoff_s = settings.engine_poll_s
        silent = 0
        while True:
            if self._service.state.phase == "detached":
                silent = 0
                attached = await self._attach()
                backoff_s = (
                    settings.engine_poll_s
                    if attached
                    else min(backoff_s * 2, settings.attach_backoff_max_s)
                )
                await self._until_reachable(backoff_s)
                continue
            await asyncio.sleep(settings.engine_poll_s)
            try:
                there = await self._service.workers.still_there(settings.engine_probe_timeout_s)
            except EngineDetachedError as error:
                self._service.lose_engine(error.message)
            except WeightSyncError as error:
                # busy engines are slow to answer: a deadline once is no reason to tear a push
                silent += 1
                if silent >= _MAX_SILENT:
                    self._service.note("look at the engine", error)
                    self._service.lose_engine(error.message)
            except Exception:
                log.exception("the look at the engine failed")
            else:
                silent = 0
                if not there:
                    self._service.lose_engine("its workers are other processes than before")

    async def _attach(self) -> bool:
        deadline = time.monotonic() + self._settings.attach_timeout_s
        try:
            await self._service.run(Work(AttachAsked(), deadline))
        except WeightSyncError:
            return False  # the service has noted it
        except Exception:
            log.exception("attach failed")
            return False
        log.info("attached to %s", ", ".join(self._settings.engine_url))
        return True

    async def _until_reachable(self, backoff_s: float) -> None:
        """Wait out the back-off, but not when an engine that was gone answers again."""
        until = time.monotonic() + backoff_s
        gone = False
        while self._service.state.phase == "detached" and time.monotonic() < until:
            await asyncio.sleep(min(self._settings.engine_poll_s, backoff_s))
            try:
                await self._service.engines.info(self._settings.engine_probe_timeout_s)
            except WeightSyncError:
                gone = True
            else:
                if gone:
                    return

    async def _journal(self) -> None:
        while True:
            await asyncio.sleep(_JOURNAL_RETRY_S)
            self._service.journal.retry()

    async def _pushes(self) -> None:
        idle_s = self._settings.push_idle_timeout_s
        while True:
            await asyncio.sleep(min(1.0, idle_s / 4))
            push_id, phase = self._service.state.owner, self._service.state.phase
            if push_id is None or phase == "detached" or self._service.idle_s < idle_s:
                continue
            self._service.note(
                "push",
                DeadlineError(
                    f"push {push_id} was not heard of for {idle_s:g} s while the engine was "
                    f"{phase}: given up",
                    hint="is its trainer gone?",
                    push_id=push_id,
                    phase=phase,
                ),
            )
            deadline = time.monotonic() + self._settings.engine_timeout_s
            try:
                await self._service.run(Work(AbortAsked(push_id), deadline))
            except WeightSyncError as error:
                log.warning("giving up push %s: %s", push_id, error)
