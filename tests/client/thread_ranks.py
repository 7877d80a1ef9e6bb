"""Ranks that are threads of this process: the meetings without a network."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from weightsync.errors import RankFailedError
from weightsync_client.ranks import WiredRanks


class Wire:
    def __init__(self, world_size: int) -> None:
        self.reports = [queue.Queue[bytes]() for _ in range(world_size)]
        self.answers = [queue.Queue[bytes]() for _ in range(world_size)]


class ThreadRanks(WiredRanks):
    def __init__(self, wire: Wire, rank: int, *, apart_s: float = 10.0) -> None:
        super().__init__(rank, len(wire.reports), apart_s=apart_s)
        self.wire = wire

    def _collect(self, deadline: float) -> list[bytes]:
        return [_get(self.wire.reports[r], r, deadline) for r in range(1, self.world_size)]

    def _answer(self, frame: bytes) -> None:
        for answers in self.wire.answers[1:]:
            answers.put(frame)

    def _report(self, frame: bytes, deadline: float) -> bytes:
        self.wire.reports[self.rank].put(frame)
        return _get(self.wire.answers[self.rank], 0, deadline)

    def close(self) -> None:
        pass


def _get(messages: queue.Queue[bytes], rank: int, deadline: float) -> bytes:
    try:
        return messages.get(timeout=max(deadline - time.monotonic(), 0.001))
    except queue.Empty:
        raise RankFailedError(f"rank {rank} did not report", rank=rank) from None


def on_all(calls: list[Callable[[], Any]], *, timeout_s: float = 30.0) -> list[Any]:
    """Every rank's call in a thread of its own; what each returned or raised."""
    results: list[Any] = [None] * len(calls)

    def run(rank: int) -> None:
        try:
            results[rank] = calls[rank]()
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(r,), daemon=True) for r in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
        assert not thread.is_alive(), "a rank hangs"
    return results
