"""A call that is repeated gets the first one's answer, never a second effect."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, TypeVar

from weightsync.errors import InputError

T = TypeVar("T")
Mark = Callable[[], None]

#: answers kept; a push needs five
_KEPT = 64


class _Entry:
    """One call: what was asked, the task that answers, whether its effects have begun."""

    __slots__ = ("asked", "begun", "task")

    def __init__(self, asked: Hashable) -> None:
        self.asked = asked
        self.begun = False
        self.task: asyncio.Task[Any] | None = None


class Once:
    """Remembers the last calls by key.  Used on the event loop only.

    Args:
        kept: Told of each answer that is remembered: its key, what was asked, and its task.
    """

    def __init__(self, kept: Callable[[Hashable, Hashable, asyncio.Task[Any]], None]) -> None:
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._recalled: dict[Hashable, tuple[Hashable, Callable[[], Any]]] = {}
        self._kept = kept

    def knows(self, key: Hashable) -> bool:
        """Whether a repeat of ``key`` would get a remembered answer, or one that is on its way."""
        return key in self._entries or key in self._recalled

    def forget_finished(self, key: Hashable) -> None:
        """Make the next call of ``key`` a new one, unless one is running."""
        entry = self._entries.get(key)
        if entry is not None and entry.task is not None and entry.task.done():
            del self._entries[key]

    async def run(
        self,
        key: Hashable,
        asked: Hashable,
        work: Callable[[Mark], Coroutine[Any, Any, T]],
        *,
        keep_errors: bool = False,
    ) -> T:
        """The answer of ``work``, made once for ``key``.

        A caller that goes away does not stop the work.  ``work`` calls its argument when its
        first effect begins; an answer without effects is not remembered, nor is an error unless
        ``keep_errors``.

        Raises:
            InputError: ``key`` was used to ask for something else.
        """
        if key in self._recalled:
            before, recalled = self._recalled[key]
            self._refuse_other(key, before, asked)
            remembered: T = recalled()
            return remembered
        entry = self._entries.get(key)
        if entry is None or entry.task is None:
            entry = self._entries[key] = _Entry(asked)
            entry.task = asyncio.create_task(work(lambda: setattr(entry, "begun", True)))
            entry.task.add_done_callback(lambda t: self._finished(key, entry, t, keep_errors))
        else:
            self._refuse_other(key, entry.asked, asked)
        answer: T = await asyncio.shield(entry.task)
        return answer

    @staticmethod
    def _refuse_other(key: Hashable, before: Hashable, asked: Hashable) -> None:
        if before != asked:
            raise InputError(
                f"{key!r} was used to ask for something else before",
                hint="use a new push_id or session for what is not a repeat",
            )

    async def stop(self) -> None:
        """Cancel what runs and wait for its end."""
        tasks = [e.task for e in self._entries.values() if e.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _finished(
        self, key: Hashable, entry: _Entry, task: asyncio.Task[Any], keep_errors: bool
    ) -> None:
        failed = task.cancelled() or task.exception() is not None
        if not entry.begun or (failed and not keep_errors):
            if self._entries.get(key) is entry:
                del self._entries[key]
            return
        self._kept(key, entry.asked, task)
        self._trim()

    def recall(self, key: Hashable, asked: Hashable, answer: Callable[[], Any]) -> None:
        """Remember what was answered before this process was there; ``answer`` gives or raises."""
        self._recalled[key] = asked, answer

    def _trim(self) -> None:
        while len(self._entries) > _KEPT:
            oldest = next(iter(self._entries))
            done = self._entries[oldest].task
            if done is not None and not done.done():
                break
            del self._entries[oldest]
