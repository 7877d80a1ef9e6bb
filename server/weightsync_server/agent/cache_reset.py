"""Dropping what an engine has computed with the old weights."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine

from weightsync.errors import DeadlineError

Reset = Callable[[], Coroutine[object, object, None]]


class CacheReset:
    """One push's reset: done before its commit, and beside its writes where the engine is paused.

    A drained engine makes no new blocks meanwhile.  The commit waits before it asks the workers:
    if the reset fails they still say that they are dirty, even to a new agent.  One that knows
    nothing of the begin resets, too.

    Args:
        reset: Does it.

    Attributes:
        wanted: Whether it is, and was not done otherwise.
    """

    def __init__(self, reset: Reset) -> None:
        self._reset = reset
        self._task: asyncio.Task[float] | None = None
        self.wanted = True

    def begin(self, *, wanted: bool, paused: bool) -> None:
        """A push begins; what its reset fails with, :meth:`finish` raises."""
        self.drop()
        self.wanted = wanted
        if wanted and paused:
            self._task = asyncio.create_task(_timed(self._reset))

    async def finish(self, timeout_s: float) -> float | None:
        """The engine is paused: wait for the reset, or do it; the seconds that it took.

        Returns:
            None: it is not wanted.

        Raises:
            WeightSyncError: The caches were not dropped, or not in time.
        """
        if not self.wanted:
            return None
        task, self._task = self._task or asyncio.create_task(_timed(self._reset)), None
        try:
            return await asyncio.wait_for(task, timeout_s)
        except TimeoutError:
            raise DeadlineError(
                f"the engine did not drop its caches within {timeout_s:.1f} s of the commit",
                hint="look at the engine's log",
                phase="commit",
            ) from None

    def drop(self) -> None:
        """The push is over: nobody asks how its reset ended."""
        task, self._task, self.wanted = self._task, None, True
        if task is not None:
            task.add_done_callback(lambda t: t.cancelled() or t.exception())
            task.cancel()


async def _timed(reset: Reset) -> float:
    started = time.monotonic()
    await reset()
    return time.monotonic() - started
