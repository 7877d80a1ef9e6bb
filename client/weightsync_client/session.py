"""One epoch: what a rendezvous leaves behind, and what every push of that epoch uses again."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from weightsync.codec import pack
from weightsync.digest import digests
from weightsync.errors import LayoutError
from weightsync.layout import WorkerLayout
from weightsync.manifest import Manifest
from weightsync.plan import TransportPlan
from weightsync.slots import Write
from weightsync.transport.base import PreparedWrite, Side, Transport, WriteOp
from weightsync_client.declaration import Declaration
from weightsync_client.slots import Slots
from weightsync_client.source import WeightSource


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker of one agent.  ``metadata`` reaches it; ``writes`` is this rank's part."""

    agent: int
    place: str
    metadata: bytes
    layout: WorkerLayout
    writes: tuple[Write, ...]


@dataclass(frozen=True, slots=True)
class Offer:
    """A :class:`weightsync.protocol.RankOffer` on its way to rank 0."""

    metadata: str
    writes: list[str]


class Session:
    """One rank's slots, registration, peers and prepared writes of one epoch (WS-8).

    Made by :func:`weightsync_client.rendezvous.open_session`.  Nothing of it is used after
    ``close``; the next epoch has a transport of its own, whose name was never used.

    Attributes:
        id: Of the session; the same at every agent and rank.
        epochs: Each agent's epoch, in the fleet's order.
        declaration: What this rank declared.
        nbytes: Bytes of one push from this rank, over all workers.
        total_nbytes: From all ranks.
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
        device: torch.device,
        make_transport: Callable[[], Transport],
    ) -> None:
        self.id = session_id
        self.epochs = tuple(epochs)
        self.declaration = declaration
        self.nbytes = self.total_nbytes = plan.nbytes
        self._rank = plan.rank
        self._workers = workers
        self._prepared: list[tuple[int, PreparedWrite]] = []
        # Replicas read the same slot bytes: those are checked and digested once.
        self._ranges = {
            (w.slot_offset, w.nbytes): worker.layout.regions[w.region].dtype
            for worker in workers
            for w in worker.writes
        }
        self._owned = ExitStack()  # closes the newest first: writes, registration, wire, slots
        try:
            self.slots = Slots(plan, manifest, device)
            self._owned.callback(self.slots.close)
            self._transport = self._owned.enter_context(make_transport())
            self._owned.enter_context(self._transport.register([self.slots.slab.memory]))
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
                pack([(w.region, w.offset, w.nbytes) for w in worker.writes])
                if worker.writes
                else ""
                for worker in self._workers
                if worker.agent == agent
            ],
        )

    def prepare(self) -> None:
        """Prepare one write a worker, for all pushes of this epoch.

        Raises:
            TransportError: See :meth:`weightsync.transport.base.Transport.prepare`.
        """
        slab = self.slots.slab.memory
        for worker in self._workers:
            if not worker.writes:
                continue
            regions = worker.layout.regions
            sides = {
                Side(regions[w.region].kind, regions[w.region].device_id) for w in worker.writes
            }
            if len(sides) > 1:  # a notification covers one prepared write (WS-2)
                raise LayoutError(
                    f"regions of worker {worker.place} are in several kinds of memory: {sides}",
                    hint="stage in the memory that the kernel tensors are in",
                    worker=worker.place,
                )
            peer = self._transport.add_peer(worker.metadata)
            # before the slots go: a write that was given up may still be on its way (WS-3)
            self._owned.callback(self._transport.remove_peer, peer)
            ops = [
                WriteOp(slab.addr + w.slot_offset, regions[w.region].addr + w.offset, w.nbytes)
                for w in worker.writes
            ]
            write = self._transport.prepare(
                peer, ops, local=Side(slab.kind, slab.device_id), remote=sides.pop()
            )
            self._prepared.append((worker.agent, self._owned.enter_context(write)))

    def fill(self, source: WeightSource, *, check_finite: bool) -> list[list[str]]:
        """Fill the slots; the packed digests of what will be written, by agent and worker.

        The engines serve meanwhile.  Every copy has ended when this returns.

        Raises:
            NonFiniteError: See :meth:`weightsync_client.slots.Slots.check_finite`.
        """
        self.slots.fill(source)
        if check_finite:
            ranges = [(at, nbytes, dtype) for (at, nbytes), dtype in self._ranges.items()]
            self.slots.check_finite(source, ranges)
        digest = dict(zip(self._ranges, digests(self.slots.pieces(self._ranges)), strict=True))
        return [
            [
                pack([digest[w.slot_offset, w.nbytes] for w in worker.writes])
                for worker in self._workers
                if worker.agent == agent
            ]
            for agent in range(len(self.epochs))
        ]

    def write(self, version: int, *, timeout_s: float) -> None:
        """Post every worker's write and wait until all have completed at the far end (WS-3).

        After any error, KeyboardInterrupt too, writes may be in flight: close the session.

        Raises:
            TransportError, DeadlineError: See :class:`weightsync.transport.base.Transport`.
        """
        for agent, write in self._prepared:
            self._transport.post(write, f"ws:{self.epochs[agent]}:{version}:{self._rank}".encode())
        self._transport.wait([write for _, write in self._prepared], timeout_s=timeout_s)

    def close(self) -> None:
        """Give up what is in flight and release everything.  Safe to call twice."""
        self._owned.close()
