"""One epoch of a worker: who writes what, who has reported, and whether the bytes are right."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

import torch

from weightsync import digest
from weightsync.coverage import check_writes
from weightsync.errors import DeadlineError, NoSessionError, PlanError, StaleEpochError, VerifyError
from weightsync.manifest import Manifest
from weightsync.transport.base import Transport
from weightsync.worker_messages import (
    BeginBody,
    CommitBody,
    PrepareBody,
    RankDigestsBody,
    RankWrites,
)
from weightsync_server.receiver.laps import Laps
from weightsync_server.receiver.target import Target
from weightsync_server.receiver.units import Proofs

_POLL_S = 0.0005
#: regions that may be written while the engine serves (WS-1), and all of them
APART = frozenset({"shadow", "staged"})
LIVE = frozenset({"direct"})
ALL = APART | LIVE


class _Once:
    """Makes a call the first time; what it raises is raised at the end."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._called = False
        self._error: Exception | None = None

    def __call__(self) -> None:
        if not self._called:
            self._called = True
            try:
                self._call()
            except Exception as error:
                self._error = error

    def end(self) -> None:
        self()
        if self._error is not None:
            raise self._error


class Epoch:
    """Everything that is thrown away when an epoch ends (WS-8).

    Args:
        number: The agent's number of it.
        manifest: What the trainer sends.
        target: Where it lands.
        proofs: How it gets from there into the kernel tensors.
        new_transport: Makes one that was never used; it is closed with the epoch.
        shadowed: Whether a commit exchanges what serves with a shadow of it.

    Attributes:
        metadata: With what the ranks reach the target's memory, which is registered.
    """

    def __init__(
        self,
        number: int,
        manifest: Manifest,
        target: Target,
        proofs: Proofs,
        new_transport: Callable[[], Transport],
        *,
        shadowed: bool,
    ) -> None:
        self.number = number
        self.manifest = manifest
        self.target = target
        self.proofs = proofs
        self.shadowed = shadowed
        self.pushing: BeginBody | None = None
        #: what was written to shadow and staging memory is checked, and belongs to `pushing`
        self.prepared = False
        self._modes = [r.mode for r in target.layout.regions]
        self._writes: dict[int, list[tuple[int, int, int]]] = {}
        self._peers: dict[int, str] = {}
        self._known_scans: dict[
            tuple[int, frozenset[str], bool], list[tuple[list[int], digest.Scan]]
        ] = {}
        self._seen: set[tuple[str, bytes]] = set()
        self._begun = 0
        self.transport = new_transport()
        try:
            self.transport.register(target.local_memory())
            self.metadata = self.transport.metadata()
        except BaseException:
            self.close()
            raise

    def check_number(self, number: int) -> None:
        """Refuse what is meant for another epoch (WS-8).

        Raises:
            StaleEpochError: It is.
        """
        if number != self.number:
            raise StaleEpochError(
                f"epoch {number} is over at {self.target.layout.place}: it is {self.number} now",
                hint="make a new rendezvous",
            )

    def connect(self, ranks: list[RankWrites]) -> None:
        """Take in the writing ranks and prove that together they write every byte once (WS-7).

        Raises:
            PlanError: They do not, or a rank comes twice.
            TransportError: A rank's metadata is none.
        """
        writes = {r.rank: r.writes for r in ranks}
        if len(writes) != len(ranks):
            raise PlanError(
                f"a rank comes twice among {[r.rank for r in ranks]}",
                hint="every trainer rank connects once",
            )
        check_writes(self.target.layout, writes)
        peers = {r.rank: self.transport.add_peer(r.metadata) for r in ranks if r.writes}
        self._peers, self._writes = peers, {rank: writes[rank] for rank in peers}
        self._known_scans = {}
        # compile the kernel now, not while the engine stands still at the first commit
        for of_rank in self._writes.values():
            digest.digests([self.target.piece(*of_rank[0])])

    @property
    def exposed(self) -> bool:
        """Whether some writes land in live memory."""
        return "direct" in self._modes

    def begin(self, body: BeginBody) -> None:
        """Expect a version that :meth:`is_pushing` does not know.

        Raises:
            NoSessionError: No rank is connected.
            StaleEpochError: The version was begun in this epoch before: its notifications are
                out, and could not be told from those of a second try.
        """
        if not self._writes:
            raise NoSessionError("no rank is connected", hint="call /connect first")
        if body.version <= self._begun:
            raise StaleEpochError(
                f"version {body.version} was begun in epoch {self.number} before",
                hint="make a new rendezvous: its writers' messages would count for this push",
            )
        self.pushing, self._begun, self.prepared = body, body.version, False
        self._seen.clear()

    def is_pushing(self, body: BeginBody | PrepareBody | CommitBody) -> bool:
        """Whether that push has begun that version here, and has not ended."""
        return self.pushing is not None and (
            (self.pushing.version, self.pushing.push_id) == (body.version, body.push_id)
        )

    def check_pushing(self, body: PrepareBody | CommitBody) -> None:
        """Refuse a push that has not begun.

        Raises:
            NoSessionError: It has not.
        """
        if not self.is_pushing(body):
            raise NoSessionError(
                f"push {body.push_id} of version {body.version} was never begun at "
                f"{self.target.layout.place}",
                hint="call /begin_update first",
            )

    @property
    def plain(self) -> bool:
        """Whether a commit installs nothing: all is written in place, and proven to be right so."""
        in_place = all(unit.kind == "direct" for unit in self.proofs.units)
        return self.proofs.proven and in_place and set(self._modes) == {"direct"}

    def check_landed(
        self,
        body: PrepareBody | CommitBody,
        laps: Laps,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> None:
        """Wait for the writers and compare digests, but not again of what was ``prepared``.

        Args:
            body: Of the call.
            laps: Told how long both took.
            meanwhile: Called once all is written, while digests are computed; what it raises comes
                after what they tell.

        Raises:
            DeadlineError: A writer did not report this version in time.
            VerifyError: A digest differs.
        """
        due = self.exposed or not self.prepared
        if due:
            self._wait_for_writers(body)
        laps.end("writers")
        if due:
            rest = LIVE if self.prepared else ALL
            modes = APART if isinstance(body, PrepareBody) else rest
            once = _Once(meanwhile)
            self._check_digests(body.ranks, modes, once)
            once.end()
        laps.end("digest")

    def _wait_for_writers(self, body: CommitBody | PrepareBody) -> None:
        """Wait until every rank's notification of this version is there.

        Before the pause (``PrepareBody``) a rank that also writes to live memory has a message of
        its own for what it has written so far.

        Raises:
            DeadlineError: ``body.timeout_s`` is over; the message names the ranks.
        """
        # a rank is believed through its own transport only
        want = {}
        for rank, peer in self._peers.items():
            modes = {self._modes[region] for region, _, _ in self._writes[rank]}
            kind = "ws"
            if isinstance(body, PrepareBody) and "direct" in modes:
                if modes == {"direct"}:
                    continue
                kind = "shadow"
            want[peer, f"{kind}:{self.number}:{body.version}:{rank}".encode()] = rank
        deadline = time.monotonic() + body.timeout_s
        while True:
            for peer, messages in self.transport.notifications().items():
                self._seen.update((peer, message) for message in messages)
            absent = [rank for message, rank in want.items() if message not in self._seen]
            if not absent:
                return
            if not time.monotonic() < deadline:  # a NaN deadline is over, too (WS-6)
                raise DeadlineError(
                    f"ranks {absent} did not report version {body.version} to "
                    f"{self.target.layout.place} within {body.timeout_s:.1f} s of the commit",
                    hint="their writes are lost or late: push again",
                    ranks=absent,
                    phase="commit",
                )
            time.sleep(_POLL_S)

    def mismatches(
        self,
        ranks: list[RankDigestsBody],
        modes: Collection[str],
        *,
        shadow: bool = True,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> dict[int, list[tuple[int, int, int]]]:
        """The writes of each rank whose bytes in memory are not those that it sent.

        Args:
            ranks: The digests of all that they sent.
            modes: Of the regions to look at.
            shadow: Look at shadows; else at what serves.
            meanwhile: Called while digests are computed, for each rank.

        Raises:
            VerifyError: Digests are missing.
        """
        sent = {r.rank: r.digests for r in ranks}
        found = {}
        for rank, writes in self._writes.items():
            scans = self._scans(rank, frozenset(modes), shadow)
            if not scans:
                continue
            want = sent.get(rank, [])
            if len(want) != len(writes):
                raise VerifyError(
                    f"rank {rank} sent {len(want)} digests for {len(writes)} writes",
                    hint="trainer and agent must have the same version",
                )
            bad = [
                k
                for at, scan in scans
                for k, got in zip(at, scan.run(meanwhile)[0], strict=True)
                if got != want[k]
            ]
            found[rank] = [writes[k] for k in sorted(bad)]
        return found

    def _scans(
        self, rank: int, modes: frozenset[str], shadow: bool
    ) -> list[tuple[list[int], digest.Scan]]:
        """What digests a rank's writes to regions of these modes: of which writes, one a device.

        Made once: the engine stands still when they are compared.  Buffers may lie in host memory
        while the live tensors are on a GPU.
        """
        made = self._known_scans.get((rank, modes, shadow))
        if made is None:
            by_device: dict[torch.device, tuple[list[int], list[torch.Tensor]]] = {}
            for k, write in enumerate(self._writes[rank]):
                if self._modes[write[0]] in modes:
                    piece = self.target.piece(*write, shadow=shadow)
                    at, pieces = by_device.setdefault(piece.device, ([], []))
                    at.append(k)
                    pieces.append(piece)
            made = [(at, digest.Scan(pieces, None)) for at, pieces in by_device.values()]
            self._known_scans[rank, modes, shadow] = made
        return made

    def _check_digests(
        self, ranks: list[RankDigestsBody], modes: Collection[str], meanwhile: _Once
    ) -> None:
        """Compare what has landed in regions of these modes with what the ranks sent.

        Raises:
            VerifyError: It differs.
        """
        for rank, bad in self.mismatches(ranks, modes, meanwhile=meanwhile).items():
            if bad:
                writes = self._writes[rank]
                region = self.target.layout.regions[bad[0][0]].name
                raise VerifyError(
                    f"{len(bad)} of {len(writes)} writes of rank {rank} differ from what it sent; "
                    f"the first is {bad[0][2]} bytes at {bad[0][1]} of {region} at "
                    f"{self.target.layout.place}",
                    hint="push again; if it repeats, look at the network cards and at who else "
                    "writes to this memory",
                    tensor=region,
                )

    def close(self) -> None:
        """Drop peers, registrations, staging."""
        self._known_scans.clear()  # no view outlives the memory
        self.transport.close()
