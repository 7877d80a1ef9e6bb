"""Server-sent events: every change of state, for whoever listens."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

#: events kept for listeners that come back with ``Last-Event-ID``
_KEPT = 256
#: events that a listener may lag behind before its stream is ended
_BACKLOG = 1024


class EventHub:
    """Numbers events and hands them to every listener.  Used on the event loop only."""

    def __init__(self) -> None:
        self._last_id = 0
        self._recent: deque[tuple[int, str]] = deque(maxlen=_KEPT)
        self._listeners: set[asyncio.Queue[str | None]] = set()
        self._closed = False

    def publish(self, kind: str, data: dict[str, Any]) -> None:
        """Send one event.  Never waits: a listener that lags too far is cut off."""
        self._last_id += 1
        text = f"id: {self._last_id}\nevent: {kind}\ndata: {json.dumps(data)}\n\n"
        self._recent.append((self._last_id, text))
        for queue in list(self._listeners):
            if queue.qsize() >= _BACKLOG:
                self._listeners.discard(queue)
                queue.put_nowait(None)  # it reconnects with Last-Event-ID and gets what is kept
            else:
                queue.put_nowait(text)

    async def stream(
        self, present: dict[str, Any], *, last_id: int | None, heartbeat_s: float
    ) -> AsyncIterator[str]:
        """The events from now on, after the present state and those kept since ``last_id``.

        Ends when the hub is closed, or when the listener lags too far behind.
        """
        queue: asyncio.Queue[str | None] = asyncio.Queue()
        if self._closed:
            return
        # taken at the same moment, so that no event is missed and none comes twice
        self._listeners.add(queue)
        missed = [t for i, t in self._recent if last_id is not None and i > last_id]
        try:
            yield f"event: state\ndata: {json.dumps(present)}\n\n"
            for text in missed:
                yield text
            while True:
                try:
                    text_or_end = await asyncio.wait_for(queue.get(), heartbeat_s)
                except TimeoutError:
                    yield ": still here\n\n"
                    continue
                if text_or_end is None:
                    return
                yield text_or_end
        finally:
            self._listeners.discard(queue)

    def close(self) -> None:
        """End every stream, so that the server can stop."""
        self._closed = True
        for queue in self._listeners:
            queue.put_nowait(None)
