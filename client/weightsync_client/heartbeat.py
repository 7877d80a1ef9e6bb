"""The sign of life that a push gives its agents while its writes take long."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Heartbeat:
    """Calls ``beat`` now and then, from a thread of its own, from its start until it is stopped.

    A process that stands still does not beat, and one that writes does, however long a single
    write holds the thread that posted it.  The thread is there before the start, which comes while
    engines stand still: until it is stopped.

    Args:
        beat: Must end by itself, within seconds, and must not raise.
        every_s: Seconds between two calls, and the most before the first one.
    """

    def __init__(self, beat: Callable[[], object], *, every_s: float) -> None:
        self._beat = beat
        self._every_s = every_s
        self._over = threading.Event()
        self._started = False
        threading.Thread(target=self._run, name="weightsync-heartbeat", daemon=True).start()

    def start(self) -> None:
        """Begin."""
        self._started = True

    def stop(self) -> None:
        """No call begins after this; one that runs is not waited for.  Safe to call twice."""
        self._over.set()

    def _run(self) -> None:
        while not self._over.wait(self._every_s):
            if self._started:
                self._beat()
