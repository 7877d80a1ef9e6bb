"""One epoch: what a rendezvous leaves behind, and what every push of that epoch uses again."""

from __future__ import annotations

import base64
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from weightsync.codec import pack, unpack
from weightsync.digest import digests
from weightsync.errors import LayoutError
from weightsync.layout import WorkerLayout
from weightsync.manifest import Manifest
from weightsync.plan import TransportPlan, build_plan
from weightsync.protocol import (
    PROTOCOL_VERSION,
    ConnectRequest,
    InitTransferRequest,
    InitTransferResponse,
    RankDigests,
    RankOffer,
    StepResponse,
)
from weightsync.slots import Write
from weightsync.transport.base import PreparedWrite, Side, Transport, WriteOp
from weightsync_client.control import Agent, Fleet
from weightsync_client.settings import Deadlines
from weightsync_client.slots import Slots
from weightsync_client.source import WeightSource

#: this process's rank; sharded trainers have more than one
RANK = 0


@dataclass(frozen=True, slots=True)
class _Worker:
    """One worker of one agent.  ``metadata`` reaches it; ``writes`` is this rank's part."""

    agent: int
    place: str
    metadata: bytes
    layout: WorkerLayout
    writes: tuple[Write, ...]


class Session:
    """Slots, registration, peers and prepared writes of one epoch (WS-8).

    Made by :func:`open_session`.  Nothing of it is used after ``close``; the next epoch has a
    transport of its own, for a transport's name is never used twice.

    Attributes:
        id: Of the session; the same at every agent.
        epochs: Each agent's epoch, in the fleet's order.
        manifest: The tensors that were agreed on.
        nbytes: Bytes of one push over all workers.
    """

    def __init__(
        self,
        session_id: str,
        *,
        epochs: Sequence[int],
        manifest: Manifest,
        workers: Sequence[_Worker],
        plan: TransportPlan,
        device: torch.device,
        make_transport: Callable[[], Transport],
    ) -> None:
        self.id = session_id
        self.epochs = tuple(epochs)
        self.manifest = manifest
        self.nbytes = sum(w.nbytes for worker in workers for w in worker.writes)
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

    def offer(self, agent: int) -> RankOffer:
        """This rank's part of ``POST /connect`` to that agent."""
        return RankOffer(
            rank=RANK,
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

    def fill(self, source: WeightSource, *, check_finite: bool) -> list[RankDigests]:
        """Fill the slots; the digests of what will be written, for each agent.

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
            RankDigests(
                rank=RANK,
                digests=[
                    pack([digest[w.slot_offset, w.nbytes] for w in worker.writes])
                    for worker in self._workers
                    if worker.agent == agent
                ],
            )
            for agent in range(len(self.epochs))
        ]

    def write(self, version: int, *, timeout_s: float) -> None:
        """Post every worker's write and wait until all have completed at the far end (WS-3).

        After any error, KeyboardInterrupt too, writes may be in flight: close the session.

        Raises:
            TransportError, DeadlineError: See :class:`weightsync.transport.base.Transport`.
        """
        for agent, write in self._prepared:
            self._transport.post(write, f"ws:{self.epochs[agent]}:{version}:{RANK}".encode())
        self._transport.wait([write for _, write in self._prepared], timeout_s=timeout_s)

    def close(self) -> None:
        """Give up what is in flight and release everything.  Safe to call twice."""
        self._owned.close()


def open_session(
    fleet: Fleet,
    source: WeightSource,
    manifest: Manifest,
    *,
    make_transport: Callable[[], Transport],
    deadlines: Deadlines,
    ignore: Sequence[str],
) -> Session:
    """Make a rendezvous with every agent; the engines go on serving.

    Args:
        fleet: All agents.
        source: Tells where the weights lie.
        manifest: Of that source.
        make_transport: Makes one with a name of its own.
        deadlines: Of the two rounds.
        ignore: Patterns of tensors that an engine may have no use for.

    Raises:
        ManifestError: A tensor that no engine takes, or that does not fit.
        RefusedError: A kernel tensor could not be proven.
        PlanError: A byte would be written twice or not at all.
        WeightSyncError: Whatever else an agent answers.
    """
    session_id = f"s-{uuid.uuid4().hex}"
    packed = pack(manifest.tensors)
    timeout_s = deadlines.rendezvous_s

    def init(agent: Agent) -> InitTransferResponse:
        request = InitTransferRequest(
            protocol_version=PROTOCOL_VERSION,
            session=session_id,
            manifest=packed,
            timeout_s=timeout_s,
        )
        return agent.post("/init_transfer", request, InitTransferResponse, timeout_s=timeout_s)

    offers = fleet.each(init)
    found = [
        (a, w, unpack(w.layout, WorkerLayout)) for a, o in enumerate(offers) for w in o.workers
    ]
    layouts = [layout for _, _, layout in found]
    plan = build_plan(manifest, layouts, rank=RANK, allow_skipped=ignore)
    workers = [
        _Worker(a, w.place, base64.b64decode(w.metadata), layout, tuple(plan.writes[i]))
        for i, (a, w, layout) in enumerate(found)
    ]
    epochs = [o.epoch for o in offers]
    session = Session(
        session_id,
        epochs=epochs,
        manifest=manifest,
        workers=workers,
        plan=plan,
        device=_device(source, manifest),
        make_transport=make_transport,
    )
    try:

        def connect(agent: Agent) -> None:
            request = ConnectRequest(
                session=session_id,
                epoch=epochs[agent.index],
                ranks=[session.offer(agent.index)],
                timeout_s=timeout_s,
            )
            agent.post("/connect", request, StepResponse, timeout_s=timeout_s)

        fleet.each(connect)
        session.prepare()
    except BaseException:
        session.close()
        raise
    return session


def _device(source: WeightSource, manifest: Manifest) -> torch.device:
    """Where most of the bytes are: the slots are filled there."""
    holdings = source.holdings()
    nbytes: Counter[torch.device] = Counter()
    for tensor in manifest:
        for index in range(len(holdings.get(tensor.name, ()))):
            local = source.local(tensor.name, index)
            nbytes[local.device] += local.nbytes
    return nbytes.most_common(1)[0][0] if nbytes else torch.device("cpu")
