"""One epoch: what a rendezvous leaves behind, and what every push of that epoch uses again."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from weightsync.codec import pack
from weightsync.digest import scan
from weightsync.errors import DeadlineError, LayoutError
from weightsync.layout import WorkerLayout
from weightsync.manifest import Manifest
from weightsync.plan import TransportPlan
from weightsync.topology import cuda_address
from weightsync.transport.base import PreparedWrite, Side, Transport, WriteOp
from weightsync.transport.slow_path import warn_if_slow
from weightsync_client.declaration import Declaration
from weightsync_client.gather import Gather
from weightsync_client.lending import Loan
from weightsync_client.slots import Slots, refuse_non_finite, torch_dtype
from weightsync_client.source import WeightSource


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker of one agent.  ``metadata`` reaches it."""

    agent: int
    place: str
    metadata: bytes
    layout: WorkerLayout


@dataclass(frozen=True, slots=True)
class _Post:
    """A round's write to one worker.  ``last``: this rank has none to that worker after it.

    ``place``: of the worker, with the number of its agent.
    """

    agent: int
    write: PreparedWrite
    last: bool
    place: str


@dataclass(frozen=True, slots=True)
class Offer:
    """A :class:`weightsync.protocol.RankOffer` on its way to rank 0."""

    metadata: str
    writes: list[str]


@dataclass(frozen=True, slots=True)
class JobSize:
    """``nbytes`` of one push, over all workers, and the ``rounds`` that they take."""

    nbytes: int
    rounds: int


class Session:
    """One rank's slots, registration, peers and prepared writes of one epoch (WS-8).

    Made by :func:`weightsync_client.rendezvous.open_session`.  Nothing of it is used after
    ``close``; the next epoch has a transport of its own, whose name was never used.
    ``staged_only``: :meth:`write` leaves live memory alone, so no push can be made of it.

    Attributes:
        id: Of the session; the same at every agent and rank.
        epochs: Each agent's epoch, in the fleet's order.
        declaration: What this rank declared.
        nbytes: Bytes of one push from this rank, over all workers.
        rounds: In which they go through this rank's slots.
        workers: All of them, agent by agent.
        job: The same of all ranks together.
        gather: What ranks give each other before they fill; None on all ranks: nothing.
    """

    def __init__(
        self,
        session_id: str,
        *,
        epochs: Sequence[int],
        declaration: Declaration,
        manifest: Manifest,
        workers: Sequence[Worker],
        plan: TransportPlan,
        gather: Gather | None,
        device: torch.device,
        loan: Loan,
        make_transport: Callable[[], Transport],
        staged_only: bool = False,
    ) -> None:
        self.id = session_id
        self.epochs = tuple(epochs)
        self.declaration = declaration
        self.gather = gather
        self.nbytes = plan.nbytes
        self.rounds = len(plan.rounds)
        self.job = JobSize(self.nbytes, self.rounds)
        self._plan = plan
        self._wrote_s = 0.0
        self._posted_at: dict[str, float] = {}
        self._staged_only = staged_only
        self.workers = workers
        self._posts: list[list[_Post]] = [[] for _ in plan.rounds]
        # Replicas read the same slot bytes: those are checked and digested once.
        self._ranges = [
            {
                (w.slot_offset, w.nbytes): worker.layout.regions[w.region].dtype
                for worker, writes in zip(workers, each.writes, strict=True)
                for w in writes
            }
            for each in plan.rounds
        ]
        self._owned = ExitStack()  # closes the newest first: writes, registration, wire, slots
        try:
            self.slots = Slots(plan, manifest, device, loan)
            self._owned.callback(self.slots.close)
            # what it is made near to is the current device
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                self._transport = self._owned.enter_context(make_transport())
            self._owned.enter_context(self._transport.register(self.slots.memory))
        except BaseException:
            self._owned.close()
            raise

    def holds(self, statuses: Sequence[Mapping[str, Any]]) -> bool:
        """Whether every agent's status names this session and epoch as the open ones."""
        return len(statuses) == len(self.epochs) and all(
            status.get("session") == self.id and status.get("epoch") == epoch
            for status, epoch in zip(statuses, self.epochs, strict=True)
        )

    def offer(self, agent: int) -> Offer:
        """This rank's part of ``POST /connect`` to that agent."""
        return Offer(
            metadata=base64.b64encode(self._transport.metadata()).decode("ascii"),
            writes=[
                pack(self._plan.declared(index)) if self._plan.writes[index] else ""
                for index, worker in enumerate(self.workers)
                if worker.agent == agent
            ],
        )

    def prepare(self) -> JobSize:
        """Prepare one write a worker and round, for all pushes of this epoch.

        Raises:
            TransportError: See :meth:`weightsync.transport.base.Transport.prepare`.
        """
        slab = self.slots.slab.memory
        for index, worker in enumerate(self.workers):
            rounds = [k for k, each in enumerate(self._plan.rounds) if each.writes[index]]
            if not rounds:
                continue
            regions = worker.layout.regions
            sides = {
                Side(regions[w.region].kind, regions[w.region].device_id)
                for w in self._plan.writes[index]
            }
            if len(sides) > 1:  # a notification covers one prepared write (WS-2)
                raise LayoutError(
                    f"regions of worker {worker.place} are in several kinds of memory: {sides}",
                    hint="stage in the memory that the kernel tensors are in",
                    worker=worker.place,
                )
            (remote,) = sides
            peer = self._transport.add_peer(worker.metadata)
            # before the slots go: a write that was given up may still be on its way (WS-3)
            self._owned.callback(self._transport.remove_peer, peer)
            for k in rounds:
                ops = [
                    WriteOp(
                        self.slots.address(w.slot_offset),
                        regions[w.region].addr + w.offset,
                        w.nbytes,
                    )
                    for w in self._plan.rounds[k].writes[index]
                    if not self._staged_only or regions[w.region].mode == "staged"
                ]
                if not ops:
                    continue
                write = self._transport.prepare(
                    peer, ops, local=Side(slab.kind, slab.device_id), remote=remote
                )
                self._owned.enter_context(write)
                place = f"agent{worker.agent}/{worker.place}"
                self._posts[k].append(_Post(worker.agent, write, k == rounds[-1], place))
        return self.job

    def fill(self, source: WeightSource, *, check_finite: bool) -> list[list[str]]:
        """Fill the slots; the packed digests of what will be written, by agent and worker.

        The engines serve meanwhile.  Every copy has ended when this returns.  Where there are
        several rounds all go through the slots, the last one first: what is left in them are the
        first two.

        Raises:
            NonFiniteError: See :func:`weightsync_client.slots.refuse_non_finite`.
        """
        digest: list[dict[tuple[int, int], bytes]] = [{} for _ in self._ranges]
        bad: dict[tuple[str, int], dict[str, object]] = {}
        for k in reversed(range(self.rounds)):
            here = self._ranges[k]
            self.slots.fill(source, k)
            dtypes = [torch_dtype(name) for name in here.values()] if check_finite else None
            found, finite = scan(self.slots.pieces(here), dtypes)
            if not finite:
                bad.update(self.slots.non_finite(source, k))
            digest[k] = dict(zip(here, found, strict=True))
        refuse_non_finite(list(bad.values()))
        return [
            [
                pack(
                    [
                        digest[k][w.slot_offset, w.nbytes]
                        for k, each in enumerate(self._plan.rounds)
                        for w in each.writes[index]
                    ]
                )
                for index, worker in enumerate(self.workers)
                if worker.agent == agent
            ]
            for agent in range(len(self.epochs))
        ]

    def write(self, version: int, source: WeightSource, *, timeout_s: float) -> None:
        """Post every worker's writes and wait until all have completed at the far end (WS-3).

        Args:
            version: Of the push.
            source: What :meth:`fill` was called with, unchanged: while a round is on the wire the
                next one is filled from it.
            timeout_s: For all rounds.

        Raises:
            TransportError, DeadlineError: See :class:`weightsync.transport.base.Transport`.  After
                any error, KeyboardInterrupt too, writes may be in flight: close the session.
        """
        started = time.monotonic()
        deadline = started + timeout_s
        self._posted_at.clear()
        # Its end waits for the fill, whatever else went wrong: nobody frees slots that are filled.
        with ThreadPoolExecutor(1, "weightsync-fill") as aside:
            for k, posts in enumerate(self._posts):
                if time.monotonic() > deadline:
                    raise DeadlineError(
                        f"version {version}: {k} of {self.rounds} rounds in {timeout_s:.1f} s",
                        hint="raise Deadlines.write_s, or max_slot_bytes: fewer rounds",
                    )
                # Round 1 is there; each later one takes the slots of the round that has just
                # completed (WS-3), and is filled while this one is posted: that may block.
                filled = None
                if 1 <= k < self.rounds - 1:
                    filled = aside.submit(self.slots.refill, source, k + 1)
                # All earlier rounds have completed, so a last write's message follows them (WS-2).
                for post in posts:
                    self._posted_at.setdefault(post.place, time.perf_counter())
                    message = f"{self.epochs[post.agent]}:{version}:{self._plan.rank}"
                    message = f"ws:{message}" if post.last else f"part:{message}:{k}"
                    self._transport.post(post.write, message.encode())
                left_s = max(deadline - time.monotonic(), 0.0)
                self._transport.wait([post.write for post in posts], timeout_s=left_s)
                if filled is not None:
                    filled.result()
        self._wrote_s = time.monotonic() - started

    def written(self) -> list[tuple[str, float, float, int]]:
        """Of the last write, for each worker: its place, first post, last completion, bytes.

        Moments are of ``time.perf_counter``.
        """
        found: dict[str, tuple[float, int]] = {}
        for post in (post for posts in self._posts for post in posts):
            done, nbytes = found.get(post.place, (0.0, 0))
            found[post.place] = max(done, post.write.completed_at), nbytes + post.write.nbytes
        now = time.perf_counter()  # of a transport that does not tell when
        return [
            (place, self._posted_at[place], done or now, nbytes)
            for place, (done, nbytes) in found.items()
        ]

    def warn_if_slow(self, ranks: int) -> None:
        """Warn if the last write of this rank, one of ``ranks``, left the fast path.

        See :func:`weightsync.transport.slow_path.warn_if_slow`.  With more than two rounds the
        write waits for fills, and tells nothing of the wire.
        """
        if self.rounds <= 2:
            warn_if_slow(
                self.nbytes,
                self._wrote_s,
                cuda_address(self.slots.slab.device),
                writers_per_worker=ranks / max(len(self.workers), 1),
            )

    def close(self) -> None:
        """Give up what is in flight and release everything.  Safe to call twice."""
        self._owned.close()
