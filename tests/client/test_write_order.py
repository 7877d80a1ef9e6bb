"""Whom a rank writes to first, and how many at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from jobs import same_report, sharded
from reference import Agent

from weightsync.errors import DeadlineError
from weightsync.transport.base import PreparedWrite
from weightsync.transport.inmemory import Fabric, InMemoryTransport


def test_ranks_do_not_all_begin_at_the_same_worker(
    make_agent: Callable[..., Agent], make_job, fabric: Fabric, weights: dict[str, torch.Tensor]
) -> None:
    posted: dict[int, list[str]] = {0: [], 1: []}

    class Watched(InMemoryTransport):
        def __init__(self, rank: int) -> None:
            super().__init__(fabric, f"trainer{rank}")
            self.rank = rank

        def post(self, write: PreparedWrite, notification: bytes) -> None:
            if notification.startswith(b"ws:"):
                posted[self.rank].append(write.peer)
            super().post(write, notification)

    transports = {rank: partial(Watched, rank) for rank in posted}
    job = make_job(*(make_agent() for _ in range(3)), ranks=2, transports=transports)
    same_report(job.push(sharded(weights, 2)))
    assert len(posted[0]) == 3
    assert posted[1] == [*posted[0][1:], posted[0][0]]


def test_no_more_writes_are_in_flight_than_may_be_and_one_that_is_slow_holds_nobody_up(
    make_agent: Callable[..., Agent], make_job, fabric: Fabric, monkeypatch: pytest.MonkeyPatch,
    weights: dict[str, torch.Tensor],
) -> None:  # fmt: skip
    monkeypatch.setattr("weightsync_client.peers._MOST_IN_FLIGHT", 2)
    posted: list[str] = []
    flying: list[str] = []
    most: list[int] = []

    class Slow(InMemoryTransport):
        """The first write ends last."""

        def post(self, write: PreparedWrite, notification: bytes) -> None:
            super().post(write, notification)
            if notification.startswith(b"ws:"):
                posted.append(write.peer)
                flying.append(write.peer)
                most.append(len(flying))

        def wait(self, writes: Sequence[PreparedWrite], *, timeout_s: float) -> None:
            peers = [write.peer for write in writes]
            if timeout_s == 0 and peers == posted[:1]:
                raise DeadlineError("not yet", peers=peers)
            super().wait(writes, timeout_s=timeout_s)
            flying[:] = [peer for peer in flying if peer not in peers]

    transports = {0: partial(Slow, fabric, "trainer0")}
    job = make_job(*(make_agent() for _ in range(5)), ranks=1, transports=transports)
    same_report(job.push(sharded(weights, 1)))
    assert len(posted) == 5
    assert most == [1, 2, 2, 2, 2]
    assert not flying
