"""One epoch: what a rendezvous leaves behind, and what every push of that epoch uses again."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

import torch

from weightsync.codec import pack
from weightsync.digest import Scan
from weightsync.errors import DeadlineError, WeightSyncError
from weightsync.layout import WorkerLayout
from weightsync.manifest import Manifest
from weightsync.plan import TransportPlan
from weightsync.process import Writer, this_process
from weightsync.targets import alike
from weightsync.topology import cuda_address
from weightsync.transport.base import Transport
from weightsync.transport.slow_path import warn_if_slow
from weightsync_client.declaration import Declaration
from weightsync_client.gather import Gather
from weightsync_client.lending import Loan
from weightsync_client.peers import Member, Peers, Worker
from weightsync_client.report import Probe
from weightsync_client.slots import Slots, refuse_non_finite, torch_dtype
from weightsync_client.source import WeightSource


@dataclass(frozen=True, slots=True)
class Offer:
    """A :class:`weightsync.protocol.RankOffer` on its way to rank 0."""

    metadata: str
    writes: list[str]
    writer: Writer | None


@dataclass(frozen=True, slots=True)
class JobSize:
    """``nbytes`` of one push, over all workers, and the ``rounds`` that they take."""

    nbytes: int
    rounds: int


class Session:
    """One rank's slots, registration, peers and prepared writes of one epoch (WS-8).

    Made by :func:`weightsync_client.rendezvous.open_session`.  Nothing of it is used after
    ``close``; the next one has a transport of its own, whose name was never used.  Agents come and
    go: one whose workers want what some worker of the plan wants is added, and one that failed is
    dropped, with its peers and handles.
    ``staged_only``: :meth:`write` leaves live memory alone, so no push can be made of it.

    Attributes:
        id: Of the session; the same at every rank.
        declaration: What this rank declared.
        manifest: What all ranks declared.
        rounds: In which the bytes go through this rank's slots.
        most_rounds: The same of the rank with the most.
        gather: What ranks give each other before they fill; None on all ranks: nothing.
        sent: The version whose bytes are in the slots, whole; None: none is.
    """

    def __init__(
        self,
        session_id: str,
        *,
        declaration: Declaration,
        manifest: Manifest,
        layouts: Sequence[WorkerLayout],
        plan: TransportPlan,
        gather: Gather | None,
        device: torch.device,
        loan: Loan,
        make_transport: Callable[[], Transport],
        staged_only: bool = False,
    ) -> None:
        self.id = session_id
        self.declaration = declaration
        self.manifest = manifest
        self.gather = gather
        self.rounds = self.most_rounds = len(plan.rounds)
        self.sent: int | None = None
        self._plan = plan
        self._layouts = layouts
        self._known_sizes: dict[int, tuple[int, int]] = {}
        self._wrote_s = 0.0
        #: of each round, in the order of its ranges
        self._digests: list[list[bytes]] = []
        # Replicas read the same slot bytes: those are checked and digested once.
        self._ranges = [
            {
                (w.slot_offset, w.nbytes): layout.regions[w.region].dtype
                for layout, writes in zip(layouts, each.writes, strict=True)
                for w in writes
            }
            for each in plan.rounds
        ]
        self._scans: dict[tuple[int, bool], Scan] = {}
        self._known_orders: dict[int, list[list[int]]] = {}
        self._owned = ExitStack()  # closes the newest first: members, registration, wire, slots
        try:
            self.slots = Slots(plan, manifest, device, loan)
            self._owned.callback(self.slots.close)
            # what it is made near to is the current device
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                self._transport = self._owned.enter_context(make_transport())
            self._owned.enter_context(self._transport.register(self.slots.memory))
            modes = {region.mode for layout in layouts for region in layout.regions}
            self.split = {"shadow", "direct"} <= modes and self.rounds == 1
            self._peers = Peers(
                self._transport, self.slots, plan, staged_only=staged_only, split=self.split
            )
            self._owned.callback(self._peers.close)
        except BaseException:
            self._owned.close()
            raise

    @property
    def members(self) -> Mapping[str, Member]:
        """Those that are written to, by the agent's URL."""
        return self._peers.members

    @property
    def in_flight(self) -> bool:
        """A write was given up and may still land: the session must end (WS-3, WS-8)."""
        return self._peers.in_flight

    @property
    def key(self) -> str:
        """The same on all ranks that have the same session with the same members."""
        members = sorted((url, m.session, m.epoch) for url, m in self.members.items())
        return f"{self.id} {members}"

    @property
    def workers(self) -> list[Worker]:
        """All that are written to, agent by agent."""
        return [worker for member in self.members.values() for worker in member.workers]

    @property
    def nbytes(self) -> int:
        """Bytes of one push from this rank, over all workers."""
        return sum(self._sizes(w.like)[0] for w in self.workers)

    @property
    def job(self) -> JobSize:
        """One push of all ranks together, who write every byte but the untouched ones (WS-7)."""
        nbytes = sum(self._sizes(w.like)[1] for w in self.workers)
        return JobSize(nbytes, self.most_rounds)

    def _sizes(self, like: int) -> tuple[int, int]:
        """Bytes that a worker of the plan gets from this rank, and from all."""
        if like not in self._known_sizes:
            regions = self._layouts[like].regions
            untouched = sum(stop - start for r in regions for start, stop in r.untouched)
            mine = sum(write.nbytes for write in self._plan.writes[like])
            self._known_sizes[like] = mine, sum(r.nbytes for r in regions) - untouched
        return self._known_sizes[like]

    def like(self, layouts: Iterable[WorkerLayout]) -> list[int] | None:
        """For each layout a worker of the plan that wants the same; None: some has none."""
        found = [
            next((k for k, known in enumerate(self._layouts) if alike(known, layout)), -1)
            for layout in layouts
        ]
        return None if -1 in found else found

    def add(self, url: str, member: Member) -> None:
        """Take an agent in; :meth:`prepare` makes the writes to it."""
        self._peers.add(url, member)

    def drop(self, url: str) -> None:
        """Release peers and handles of an agent: nothing is written there any more (WS-8)."""
        self._peers.drop(url)

    def prepare(self, urls: Iterable[str]) -> dict[str, WeightSyncError]:
        """Prepare one write a worker and round of these agents, for all pushes of this epoch.

        Returns:
            What failed, by URL.  See :meth:`weightsync.transport.base.Transport.prepare`.
        """
        return self._peers.prepare(urls)

    def offer(self, url: str) -> Offer:
        """This rank's part of ``POST /connect`` to that agent."""
        return Offer(
            metadata=base64.b64encode(self._transport.metadata(())).decode("ascii"),
            writes=[
                pack(self._plan.declared(worker.like)) if self._plan.writes[worker.like] else ""
                for worker in self.members[url].workers
            ],
            writer=this_process(),
        )

    def fill(self, source: WeightSource, *, check_finite: bool) -> dict[str, list[str]]:
        """Fill the slots; :meth:`digests` of what will be written to each agent.

        The engines serve meanwhile.  Every copy has ended when this returns.  Where there are
        several rounds all go through the slots, the last one first: what is left in them are the
        first two.

        Raises:
            NonFiniteError: See :func:`weightsync_client.slots.refuse_non_finite`.
        """
        self.sent = None
        digests: list[list[bytes]] = [[] for _ in self._ranges]
        bad: dict[tuple[str, int], dict[str, object]] = {}
        for k in reversed(range(self.rounds)):
            self.slots.fill(source, k)
            digests[k], finite = self._scan(k, check_finite).run()
            if not finite:
                bad.update(self.slots.non_finite(source, k))
        refuse_non_finite(list(bad.values()))
        self._digests = digests
        return self.digests(self.members)

    def _scan(self, number: int, check_finite: bool) -> Scan:
        """Of what a round writes: the same memory in all pushes of the epoch."""
        if (number, check_finite) not in self._scans:
            here = self._ranges[number]
            dtypes = [torch_dtype(name) for name in here.values()] if check_finite else None
            self._scans[number, check_finite] = Scan(self.slots.pieces(here), dtypes)
        return self._scans[number, check_finite]

    def digests(self, urls: Iterable[str]) -> dict[str, list[str]]:
        """For each of these agents the digests of what the last fill made, packed by worker."""
        packed: dict[int, str] = {}

        def of(worker: Worker) -> str:
            if worker.like not in packed:
                rounds = zip(self._digests, self._order(worker.like), strict=True)
                sent = [digests[k] for digests, order in rounds for k in order]
                packed[worker.like] = pack(sent, deflate=False)
            return packed[worker.like]

        return {url: [of(worker) for worker in self.members[url].workers] for url in urls}

    def _order(self, like: int) -> list[list[int]]:
        """Where a worker's writes are among the digests of each round: looked up once."""
        if like not in self._known_orders:
            self._known_orders[like] = order = []
            for here, each in zip(self._ranges, self._plan.rounds, strict=True):
                at = {where: k for k, where in enumerate(here)}
                order.append([at[w.slot_offset, w.nbytes] for w in each.writes[like]])
        return self._known_orders[like]

    def write(
        self,
        version: int,
        source: WeightSource | None,
        *,
        timeout_s: float,
        agents: Collection[str] | None = None,
        strict: bool = True,
        steps: Iterable[int] | None = None,
    ) -> dict[str, WeightSyncError]:
        """Post every worker's writes and wait until all have completed at the far end (WS-3).

        Args:
            version: Of the push.
            source: What :meth:`fill` was called with, unchanged: while a round is on the wire the
                next one is filled from it.  None where there are no more than two.
            timeout_s: For all rounds; once more for the others, where some let it pass.
            agents: Whom to write to; None: every member.
            strict: The first failure is raised.
            steps: Of a session that is ``split``: 0, what lands beside live weights; 1, the rest.

        Returns:
            Unless ``strict``: what failed, by the agent's URL; the others have all bytes.

        Raises:
            TransportError, DeadlineError: See :class:`weightsync.transport.base.Transport`.  After
                any error, KeyboardInterrupt too, writes may be in flight: close the session.
        """
        started = time.monotonic()
        deadline = started + timeout_s
        failed: dict[str, WeightSyncError] = {}
        whom = list(self.members if agents is None else agents)
        refills = self.rounds > 2 and source is not None
        # Its end waits for the fill, whatever else went wrong: nobody frees slots that are filled.
        with ThreadPoolExecutor(1, "weightsync-fill") if refills else nullcontext() as aside:
            for k in steps or range(2 if self.split else self.rounds):
                if time.monotonic() > deadline:
                    raise DeadlineError(
                        f"version {version}: {k} of {self.rounds} rounds in {timeout_s:.1f} s",
                        hint="raise Deadlines.write_s, or max_slot_bytes: fewer rounds",
                    )
                # Round 1 is there; each later one takes the slots of the round that has just
                # completed (WS-3), and is filled while this one is posted: that may block.
                filled = None
                if 1 <= k < self.rounds - 1 and aside is not None and source is not None:
                    filled = aside.submit(self.slots.refill, source, k + 1)
                to = [u for u in whom if u not in failed]
                now_failed = self._peers.write(k, version, to, deadline, strict=strict)
                if not failed and any(isinstance(e, DeadlineError) for e in now_failed.values()):
                    deadline = time.monotonic() + timeout_s
                failed |= now_failed
                if filled is not None:
                    filled.result()
        self._wrote_s = time.monotonic() - started
        return failed

    def probe(self, *, timeout_s: float) -> tuple[list[Probe], dict[str, WeightSyncError]]:
        """See :meth:`weightsync_client.peers.Peers.probe`."""
        return self._peers.probe(timeout_s=timeout_s)

    def holds_sent(self) -> bool:
        """Whether what the last push sent is in the slots and the lent memory, all of it."""
        return (
            self.sent is not None
            and self.rounds <= 2
            and all(
                digests == self._scan(k, check_finite=False).run()[0]
                for k, digests in enumerate(self._digests)
            )
        )

    def written(self) -> list[tuple[str, float, float, int]]:
        """See :meth:`weightsync_client.peers.Peers.written`."""
        return self._peers.written()

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
        self.sent = None
        self._scans.clear()  # no view outlives the memory
        self._owned.close()
