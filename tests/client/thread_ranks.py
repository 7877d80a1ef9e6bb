"""Ranks that are threads of this process: the meetings without a network."""

from __future__ import annotations

import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from weightsync.errors import RankFailedError
from weightsync_client.ranks import WiredRanks


class Wire:
    def __init__(self, world_size: int) -> None:
        self.reports = [queue.Queue[bytes]() for _ in range(world_size)]
        self.answers = [queue.Queue[bytes]() for _ in range(world_size)]
        self.given: dict[tuple[int, int], queue.Queue[bytes]] = defaultdict(queue.Queue)


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

    def exchange(
        self,
        gives: Mapping[int, torch.Tensor],
        takes: Mapping[int, torch.Tensor],
        *,
        timeout_s: float,
    ) -> None:
        deadline = time.monotonic() + timeout_s
        for rank, data in gives.items():
            self.wire.given[self.rank, rank].put(data.numpy().tobytes())
        for rank, data in takes.items():
            raw = _get(self.wire.given[rank, self.rank], rank, deadline)
            assert len(raw) == data.numel()
            data.copy_(torch.frombuffer(bytearray(raw), dtype=torch.uint8))

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
