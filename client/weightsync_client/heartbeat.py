"""The sign of life that a push gives its agents while its writes take long."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Heartbeat:
    """Calls ``beat`` now and then, from a thread of its own, until it is stopped.

    A process that stands still does not beat, and one that writes does, however long a single
    write holds the thread that posted it.

    Args:
        beat: Must end by itself, within seconds, and must not raise.
        every_s: Seconds before the first call and between two.
    """

    def __init__(self, beat: Callable[[], object], *, every_s: float) -> None:
        self._beat = beat
        self._every_s = every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="weightsync-heartbeat", daemon=True)

    def start(self) -> None:
        """Begin; at most once."""
        self._thread.start()

    def stop(self) -> None:
        """No call begins after this; one that runs is not waited for.  Safe to call twice."""
        self._over.set()

    def _run(self) -> None:
        while not self._over.wait(self._every_s):
            self._beat()
