"""Meetings over gloo: the ranks of a ``torch.distributed`` job, whatever backend it trains with."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from weightsync.errors import InputError, RankFailedError
from weightsync_client.ranks import Ranks, SoloRanks, WiredRanks

#: a rank that leaves waits this long for the others to hear what it said last
_DELIVER_S = 5.0
#: bytes of the first message: a length, and all of most frames
_FIRST_NBYTES = 8192


class GlooRanks(WiredRanks):
    """The ranks of a process group, over three gloo groups of their own.

    Reports, answers and exchanges go by different groups: a wait that runs out closes all
    connections of its group, and the ranks that are well must still hear why.

    Args:
        group: The ranks; any backend.
        apart_s: Seconds that ranks may come apart to a meeting.

    Raises:
        InputError: This process is not in the group.
        RankFailedError: Not all of its ranks made a Publisher in ``apart_s``.
    """

    def __init__(self, group: dist.ProcessGroup, *, apart_s: float) -> None:
        rank = dist.get_rank(group)
        if rank < 0:
            raise InputError(
                "this process is not in the group that pushes",
                hint="make the Publisher in the group's ranks alone",
            )
        super().__init__(rank, dist.get_world_size(group), apart_s=apart_s)
        # Not by new_group: it would have to be called by ranks outside the group too, or it counts
        # on every rank being in as many groups as the others.
        members = dist.get_process_group_ranks(group)
        place = f"weightsync/{'-'.join(map(str, members))}"
        timeout = timedelta(seconds=apart_s)
        groups: list[Any] = []
        self._sent: list[_Send] = []
        try:
            store = _get_default_store()
            # the how many-th Publisher of these ranks it is: keys in a store are used once
            turn = store.add(f"{place}/turns-of-{rank}", 1)
            for way in ("reports", "answers", "exchanges"):
                own = PrefixStore(f"{place}/{turn}/{way}", store)
                own.set_timeout(timeout)
                groups.append(dist.ProcessGroupGloo(own, rank, self.world_size, timeout=timeout))
        except RuntimeError as error:
            raise RankFailedError(
                f"rank {rank}: the {len(members)} ranks did not find together: {error}",
                hint="every rank of the group makes its Publisher, at the same place",
                rank=rank,
            ) from error
        self._reports: dist.ProcessGroup = groups[0]
        self._answers: dist.ProcessGroup = groups[1]
        self._exchanges: dist.ProcessGroup = groups[2]

    def _listen(self) -> None:
        self._answer_wait = _Receive(self._answers, 0)

    def _collect(self, deadline: float) -> list[bytes]:
        waits = [_Receive(self._reports, rank) for rank in range(1, self.world_size)]
        return [wait.finish(deadline) for wait in waits]

    def _answer(self, frame: bytes) -> None:
        # Not waited for: one that is gone would hold up the others.  All who report to the next
        # meeting have taken the answer of this one.
        self._sent = [_Send(self._answers, rank, frame) for rank in range(1, self.world_size)]

    def _report(self, frame: bytes, deadline: float) -> bytes:
        # Not waited for either: rank 0 may have given up on this meeting, and then it says so.
        self._sent = [_Send(self._reports, 0, frame)]
        return self._answer_wait.finish(deadline)

    def exchange(
        self,
        gives: Mapping[int, torch.Tensor],
        takes: Mapping[int, torch.Tensor],
        *,
        timeout_s: float,
    ) -> None:
        """See :meth:`Ranks.exchange`."""
        deadline = time.monotonic() + timeout_s
        rank = -1
        try:
            works: list[tuple[int, Any]] = []
            for rank, data in takes.items():
                works.append((rank, self._exchanges.recv([data], rank, 0)))
            for rank, data in gives.items():
                works.append((rank, self._exchanges.send([data], rank, 0)))
            for rank, work in works:  # noqa: B007 - the error names it
                _wait(work, deadline)
        except RuntimeError as error:
            late = time.monotonic() >= deadline
            what = f"gave and took nothing in {timeout_s:.0f} s" if late else "is gone"
            gone = RankFailedError(
                f"rank {rank} of the training job {what}",
                hint="look at that rank's log" + ("; is it still training?" if late else ""),
                rank=rank,
            )
            # This group is done for, and with it all: the other ranks hear of it in the meeting.
            self._lost = gone.message
            raise gone from error

    def close(self) -> None:
        """Close the connections, once what was said last has been heard."""
        sent, self._sent = self._sent, []
        deadline = time.monotonic() + _DELIVER_S
        for send in sent:
            send.finish(deadline)


class _Receive:
    """One frame on its way here.  What fits into the first message comes while nobody waits."""

    def __init__(self, group: dist.ProcessGroup, rank: int) -> None:
        self._group = group
        self._rank = rank
        self._first = torch.empty(_FIRST_NBYTES, dtype=torch.uint8)
        self._failed: RuntimeError | None = None
        try:
            self._work = group.recv([self._first], rank, 0)
        except RuntimeError as error:
            self._failed = error

    def finish(self, deadline: float) -> bytes:
        """The frame; RankFailedError names the rank that is late or gone."""
        started = time.monotonic()
        try:
            if self._failed is not None:
                raise self._failed
            _wait(self._work, deadline)
            first = self._first.numpy().tobytes()
            length = int.from_bytes(first[:8], "little")
            frame = first[8 : 8 + length]
            if length > len(frame):
                rest = torch.empty(length - len(frame), dtype=torch.uint8)
                _wait(self._group.recv([rest], self._rank, 1), deadline)
                frame += rest.numpy().tobytes()
        except RuntimeError as error:
            late = time.monotonic() >= deadline
            what = f"did not report in {deadline - started:.0f} s" if late else "is gone"
            raise RankFailedError(
                f"rank {self._rank} of the training job {what}",
                hint="look at that rank's log" + ("; is it still training?" if late else ""),
                rank=self._rank,
            ) from error
        return frame


class _Send:
    """One frame on its way there."""

    def __init__(self, group: dist.ProcessGroup, rank: int, frame: bytes) -> None:
        data = bytearray(len(frame).to_bytes(8, "little") + frame)
        data += bytes(max(0, _FIRST_NBYTES - len(data)))
        message = torch.frombuffer(data, dtype=torch.uint8)
        self._works: list[Any] = []
        try:
            self._works.append(group.send([message[:_FIRST_NBYTES]], rank, 0))
            if len(message) > _FIRST_NBYTES:
                self._works.append(group.send([message[_FIRST_NBYTES:]], rank, 1))
        except RuntimeError:
            self._works.clear()  # it is gone: the next meeting finds out

    def finish(self, deadline: float) -> None:
        """Wait until the other end took it, or until there is no hope."""
        with suppress(RuntimeError):
            for work in self._works:
                _wait(work, deadline)


def _wait(work: Any, deadline: float) -> None:
    work.wait(timedelta(seconds=max(deadline - time.monotonic(), 0.001)))


def make_ranks(group: dist.ProcessGroup | Literal["default"] | None, *, apart_s: float) -> Ranks:
    """The ranks of ``group``; ``None``, or no process group at all: this process alone.

    Raises:
        InputError, RankFailedError: See :class:`GlooRanks`.
    """
    if group == "default":
        group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    if group is None or isinstance(group, str) or dist.get_world_size(group) == 1:
        return SoloRanks()
    return GlooRanks(group, apart_s=apart_s)
