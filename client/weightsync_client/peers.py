"""The agents that one rank writes to in one epoch: peers, prepared writes, rounds."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from weightsync.errors import DeadlineError, LayoutError, TransportError, WeightSyncError
from weightsync.layout import WorkerLayout
from weightsync.plan import TransportPlan
from weightsync.transport.base import PreparedWrite, Side, Transport, WriteOp
from weightsync_client.report import Probe
from weightsync_client.slots import Slots

#: writes of one rank, one a worker: more would only share its wire
_MOST_IN_FLIGHT = 64
_POLL_S = 100e-6


@dataclass(frozen=True, slots=True, eq=False)
class Worker:
    """One worker of one agent.  ``metadata`` reaches it.

    ``like`` is the worker of the plan that it gets the same bytes as: itself, where it was planned
    for.
    """

    agent: str
    place: str
    metadata: bytes
    layout: WorkerLayout
    like: int


@dataclass(frozen=True, slots=True)
class Member:
    """What an agent is to a session: what its calls name it by, and its workers."""

    session: str
    epoch: int
    workers: tuple[Worker, ...]

    def open_at(self, status: Mapping[str, Any]) -> bool:
        """Whether the agent's status names this as its open session."""
        return (status.get("session"), status.get("epoch")) == (self.session, self.epoch)


@dataclass(frozen=True, slots=True)
class _Post:
    """A round's write to one worker.  ``last``: this rank has none to that worker after it."""

    worker: Worker
    write: PreparedWrite
    last: bool


class Peers:
    """Who is written to, and with which handles.

    Args:
        transport: Of this epoch; its owner closes it, after this.
        slots: What is written from; registered.
        plan: Of this rank.
        staged_only: Nothing is written to live memory.
        split: The one round goes in two steps: what lands beside live weights, then the rest.

    Attributes:
        members: By the agent's URL.
        in_flight: A write was given up and may still land (WS-3).
    """

    def __init__(
        self,
        transport: Transport,
        slots: Slots,
        plan: TransportPlan,
        *,
        staged_only: bool,
        split: bool = False,
    ) -> None:
        self.members: dict[str, Member] = {}
        self.in_flight = False
        self._transport = transport
        self._slots = slots
        self._plan = plan
        self._staged_only = staged_only
        self._split = split
        self._posts: dict[str, list[list[_Post]]] = {}
        self._handles: dict[str, ExitStack] = {}
        self._posted_at: dict[Worker, float] = {}
        self._names: dict[Worker, str] = {}

    def add(self, url: str, member: Member) -> None:
        """Take an agent in; an older self of it is dropped."""
        self.drop(url)
        self.members[url] = member

    def drop(self, url: str) -> None:
        """Release peers and handles of an agent (WS-8)."""
        member = self.members.pop(url, None)
        for worker in member.workers if member is not None else ():
            self._names.pop(worker, None)
        self._posts.pop(url, None)
        if (handles := self._handles.pop(url, None)) is not None:
            handles.close()

    def prepare(self, urls: Iterable[str]) -> dict[str, WeightSyncError]:
        """Prepare one write a worker and round of these agents; what failed, by URL."""
        failed: dict[str, WeightSyncError] = {}
        for url in urls:
            self._handles[url] = ExitStack()
            self._posts[url] = [[] for _ in range(2 if self._split else len(self._plan.rounds))]
            try:
                for worker in self.members[url].workers:
                    self._prepare(worker, self._posts[url], self._handles[url])
            except WeightSyncError as error:
                failed[url] = error
        return failed

    def _prepare(self, worker: Worker, posts: list[list[_Post]], handles: ExitStack) -> None:
        slab = self._slots.slab.memory
        regions = worker.layout.regions
        steps = [list(each.writes[worker.like]) for each in self._plan.rounds]
        if self._split:
            live = [w for w in steps[0] if regions[w.region].mode == "direct"]
            steps = [[w for w in steps[0] if regions[w.region].mode != "direct"], live]
        used = [k for k, writes in enumerate(steps) if writes]
        if not used:
            return
        peer = self._names[worker] = self._transport.add_peer(worker.metadata)
        # before the slots go: a write that was given up may still be on its way (WS-3)
        handles.callback(self._transport.remove_peer, peer)
        for k in used:
            sides = {Side(regions[w.region].kind, regions[w.region].device_id) for w in steps[k]}
            if len(sides) > 1:  # a notification covers one prepared write (WS-2)
                raise LayoutError(
                    f"regions of worker {worker.place} are in several kinds of memory: {sides}",
                    hint="stage in the memory that the kernel tensors are in",
                    worker=worker.place,
                )
            (remote,) = sides
            ops = [
                WriteOp(
                    self._slots.address(w.slot_offset), regions[w.region].addr + w.offset, w.nbytes
                )
                for w in steps[k]
                if not self._staged_only or regions[w.region].mode == "staged"
            ]
            if not ops:
                continue
            write = self._transport.prepare(
                peer, ops, local=Side(slab.kind, slab.device_id), remote=remote
            )
            handles.enter_context(write)
            posts[k].append(_Post(worker, write, k == used[-1]))

    def write(
        self, k: int, version: int, to: Iterable[str], deadline: float, *, strict: bool
    ) -> dict[str, WeightSyncError]:
        """Post round (or step) ``k`` to these agents and wait for it; what failed, by URL.

        Raises:
            TransportError, DeadlineError: With ``strict``, the first failure.
        """
        if k == 0:
            self._posted_at.clear()
        failed: dict[str, WeightSyncError] = {}
        posted: list[_Post] = []
        in_flight: list[_Post] = []
        posts = [post for url in to for post in self._posts[url][k]]
        turn = self._plan.rank % max(len(posts), 1)  # ranks do not all begin at the same worker
        # All earlier rounds have completed, so a last write's message follows them (WS-2).
        for post in [*posts[turn:], *posts[:turn]]:
            message = f"{self.members[post.worker.agent].epoch}:{version}:{self._plan.rank}"
            early = f"shadow:{message}" if self._split else f"part:{message}:{k}"
            message = f"ws:{message}" if post.last else early
            self._make_room(in_flight, deadline)
            self._posted_at.setdefault(post.worker, time.perf_counter())
            try:
                self._transport.post(post.write, message.encode())
                posted.append(post)
                in_flight.append(post)
            except TransportError as error:
                if strict:
                    raise
                failed.setdefault(post.worker.agent, error)
        try:
            self._wait(posted, deadline)
        except (TransportError, DeadlineError):
            if strict:
                raise
            failed |= self._late(posted, deadline)
        return failed

    def _make_room(self, in_flight: list[_Post], deadline: float) -> None:
        """Wait until fewer than the most are in flight, or the deadline has passed.

        Whichever ends first makes room: one that never ends must not hold up the others.
        """
        while len(in_flight) >= _MOST_IN_FLIGHT:
            flying = []
            for post in in_flight:
                try:
                    self._transport.wait([post.write], timeout_s=0)
                except DeadlineError:
                    flying.append(post)
                except TransportError:
                    pass  # it has ended; who waits for all is told
            if len(flying) == len(in_flight):
                if time.monotonic() > deadline:
                    return
                time.sleep(_POLL_S)
            in_flight[:] = flying

    def _late(self, posts: Iterable[_Post], deadline: float) -> dict[str, WeightSyncError]:
        """Which of these posts fail, by the agent's URL."""
        failed: dict[str, WeightSyncError] = {}
        for post in posts:
            try:
                self._wait([post], deadline)
            except (TransportError, DeadlineError) as error:
                self.in_flight = self.in_flight or isinstance(error, DeadlineError)
                failed.setdefault(post.worker.agent, error)
        return failed

    def probe(self, *, timeout_s: float) -> tuple[list[Probe], dict[str, WeightSyncError]]:
        """Write to the scratch memory of every worker, which no engine reads (WS-1).

        Returns:
            The second write to each worker, and what failed, by the agent's URL.
        """
        deadline = time.monotonic() + timeout_s
        failed: dict[str, WeightSyncError] = {}
        probes: list[Probe] = []
        with ExitStack() as handles:
            posts: list[_Post] = []
            for worker in [w for member in self.members.values() for w in member.workers]:
                try:
                    if (write := self._prepare_probe(worker)) is not None:
                        posts.append(_Post(worker, handles.enter_context(write), last=False))
                        self._post_probe(posts[-1])
                except TransportError as error:
                    failed.setdefault(worker.agent, error)
            failed |= self._late([p for p in posts if p.worker.agent not in failed], deadline)
            for post in posts:  # once more, now that all are connected, and one at a time
                if post.worker.agent in failed:
                    continue
                started = time.perf_counter()
                try:
                    self._post_probe(post)
                except TransportError as error:
                    failed[post.worker.agent] = error
                    continue
                failed |= self._late([post], deadline)
                took_s = time.perf_counter() - started
                place = f"{post.worker.agent}/{post.worker.place}"
                probes.append(Probe(place, post.write.nbytes, took_s))
        return probes, failed

    def _prepare_probe(self, worker: Worker) -> PreparedWrite | None:
        """None where this rank writes nothing to that worker, or the worker has no scratch."""
        scratch, slab = worker.layout.scratch, self._slots.slab.memory
        peer = self._names.get(worker)
        if scratch is None or peer is None:
            return None
        op = WriteOp(slab.addr, scratch.addr, min(slab.nbytes, scratch.nbytes))
        return self._transport.prepare(
            peer, [op],
            local=Side(slab.kind, slab.device_id), remote=Side(scratch.kind, scratch.device_id),
        )  # fmt: skip

    def _post_probe(self, post: _Post) -> None:
        epoch = self.members[post.worker.agent].epoch
        self._transport.post(post.write, f"probe:{epoch}:{self._plan.rank}".encode())

    def _wait(self, posts: Iterable[_Post], deadline: float) -> None:
        left_s = max(deadline - time.monotonic(), 0.0)
        self._transport.wait([post.write for post in posts], timeout_s=left_s)

    def written(self) -> list[tuple[str, float, float, int]]:
        """Of the last write, for each worker: its place, first post, last completion, bytes.

        Moments are of ``time.perf_counter``.
        """
        found: dict[Worker, tuple[float, int]] = {}
        for rounds in self._posts.values():
            for post in (post for posts in rounds for post in posts):
                done, nbytes = found.get(post.worker, (0.0, 0))
                at = max(done, post.write.completed_at)
                found[post.worker] = at, nbytes + post.write.nbytes
        now = time.perf_counter()  # of a transport that does not tell when
        return [
            (f"{worker.agent}/{worker.place}", self._posted_at[worker], done or now, nbytes)
            for worker, (done, nbytes) in found.items()
            if worker in self._posted_at
        ]

    def close(self) -> None:
        """Drop all."""
        for url in list(self.members):
            self.drop(url)
