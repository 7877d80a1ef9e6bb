"""Where the time of one command went."""

from __future__ import annotations

import time


class Laps:
    """Seconds by part, each from the end of the one before."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._mark = time.perf_counter()

    def end(self, part: str) -> None:
        """This part is over."""
        now = time.perf_counter()
        self.seconds[part] = now - self._mark
        self._mark = now
