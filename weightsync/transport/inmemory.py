"""The reference transport: both ends in one process, bytes copied from address to address.

It defines what the interface means, and it can go wrong on demand (:class:`Faults`), which no
real wire does when a test needs it.  It cannot be used between processes.
"""

from __future__ import annotations

import ctypes
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from weightsync import codec
from weightsync.errors import (
    InputError,
    RegistrationError,
    TransportError,
    WeightSyncError,
)
from weightsync.transport import refusals
from weightsync.transport.base import (
    DRAM,
    LocalMemory,
    PreparedWrite,
    Registration,
    Side,
    Transport,
    WriteOp,
)
from weightsync.transport.registry import RegisteredMemory

_POLL_S = 0.0005


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong with everything that is sent to one peer.

    Attributes:
        delay_s: A write lands this much later than it was posted.
        lose_write: A posted write never lands and never completes.
        lose_notification: Bytes land and the write completes; no message arrives.
        torn_nbytes: Only so many bytes of a posted write land, and it still completes: the
            tear that digests must find.  Together with ``dead`` it is a peer that dies in
            mid-write.
        dead: The peer is gone: sending to it is a ``PeerLostError``.
    """

    delay_s: float = 0.0
    lose_write: bool = False
    lose_notification: bool = False
    torn_nbytes: int | None = None
    dead: bool = False


@dataclass(frozen=True, slots=True)
class _Metadata:
    fabric: str
    name: str
    memory: tuple[tuple[int, int], ...]


class Fabric:
    """What the transports of one process share: the switch that they are plugged into."""

    def __init__(self) -> None:
        self.id = uuid.uuid4().hex
        self.lock = threading.RLock()
        self.ends: dict[str, InMemoryTransport] = {}
        self.inboxes: dict[str, dict[str, list[bytes]]] = {}
        self._faults: dict[str, Faults] = {}

    def inject(self, peer: str, faults: Faults) -> None:
        """From now on ``faults`` befall what is sent to the transport named ``peer``."""
        with self.lock:
            self._faults[peer] = faults

    def faults(self, peer: str) -> Faults:
        """The faults of ``peer``; a transport that was closed is dead."""
        with self.lock:
            if peer not in self.ends:
                return Faults(dead=True)
            return self._faults.get(peer, Faults())


class _Registration(Registration):
    def __init__(self, owner: InMemoryTransport, memory: Sequence[LocalMemory]) -> None:
        self._owner = owner
        self._memory = tuple(memory)
        self._open = True

    def close(self) -> None:
        with self._owner.fabric.lock:
            if self._open:
                self._open = False
                self._owner.unregister(self._memory)


@dataclass(eq=False)
class _Write(PreparedWrite):
    owner: InMemoryTransport
    peer: str
    nbytes: int
    descriptors: int
    ops: tuple[WriteOp, ...]
    posted: bool = False
    #: what the wait must raise; the write cannot be posted again
    error: WeightSyncError | None = None
    closed: bool = False
    #: when the bytes land (monotonic seconds); None once they did
    due_s: float | None = field(default=None)
    notification: bytes = b""

    def close(self) -> None:
        self.closed = True
        self.posted = False
        self.due_s = None


class InMemoryTransport(Transport):
    """One end on ``fabric``; DRAM only.

    Bytes land in ``post``, or, where a delay was injected, in the first call of ``wait`` or
    ``notifications`` on either end after it.
    """

    def __init__(self, fabric: Fabric, label: str = "inmemory") -> None:
        self.fabric = fabric
        self.name = f"{label}-{uuid.uuid4().hex}"
        self._registered = RegisteredMemory()
        self._memory: set[LocalMemory] = set()
        self._peers: dict[str, RegisteredMemory] = {}
        self._writes: list[_Write] = []
        self._closed = False
        with fabric.lock:
            fabric.ends[self.name] = self
            fabric.inboxes[self.name] = {}

    def register(self, memory: Sequence[LocalMemory]) -> Registration:
        """See :meth:`Transport.register`; memory other than DRAM is refused."""
        with self.fabric.lock:
            self._refuse_closed()
            for one in memory:
                if one.kind != "DRAM":
                    raise RegistrationError(
                        f"cannot register {one.kind} at {one.addr:#x}: expected DRAM",
                        hint="use the nixl transport for device memory",
                    )
            self._registered.add(memory)
            self._memory.update(memory)
            return _Registration(self, memory)

    def unregister(self, memory: Sequence[LocalMemory]) -> None:
        """Forget registered memory (for this module's registrations)."""
        self._registered.remove(memory)
        self._memory.difference_update(memory)

    def metadata(self, of: Sequence[LocalMemory] | None = None) -> bytes:
        """See :meth:`Transport.metadata`."""
        with self.fabric.lock:
            self._refuse_closed()
            told = self._memory if of is None else of
            memory = tuple(sorted((one.addr, one.nbytes) for one in told))
            return codec.pack(_Metadata(self.fabric.id, self.name, memory)).encode()

    def add_peer(self, metadata: bytes) -> str:
        """See :meth:`Transport.add_peer`; newer metadata of a known peer replaces the old."""
        try:
            peer = codec.unpack(metadata.decode("ascii", "replace"), _Metadata)
        except InputError as error:
            raise TransportError(
                f"{len(metadata)} bytes are no metadata of an in-memory transport: {error.message}",
                hint="hand over what the peer's metadata() returned, unchanged",
            ) from error
        with self.fabric.lock:
            self._refuse_closed()
            if peer.fabric != self.fabric.id or peer.name not in self.fabric.ends:
                raise TransportError(
                    f"transport {peer.name!r} is not on this fabric",
                    hint="an in-memory transport reaches only transports of its own Fabric",
                )
            if peer.name == self.name:
                raise refusals.own_metadata(self.name)
            remote = RegisteredMemory()
            if peer.memory:
                remote.add([LocalMemory(addr, nbytes) for addr, nbytes in peer.memory])
            self._peers[peer.name] = remote
            return peer.name

    def remove_peer(self, peer: str) -> None:
        """See :meth:`Transport.remove_peer`; closes the writes to it."""
        with self.fabric.lock:
            for write in self._writes:
                if write.peer == peer:
                    write.close()
            self._peers.pop(peer, None)

    def prepare(
        self, peer: str, ops: Sequence[WriteOp], *, local: Side = DRAM, remote: Side = DRAM
    ) -> PreparedWrite:
        """See :meth:`Transport.prepare`."""
        with self.fabric.lock:
            self._refuse_closed()
            self._refuse_unknown(peer)
            self._refuse_dead(peer)
            if not ops:
                raise refusals.no_writes(peer)
            self._registered.check("local", local, peer, ((o.local_addr, o.nbytes) for o in ops))
            there = self._peers[peer]
            there.check("remote", remote, peer, ((o.remote_addr, o.nbytes) for o in ops))
            write = _Write(self, peer, sum(op.nbytes for op in ops), len(ops), tuple(ops))
            self._writes = [kept for kept in self._writes if not kept.closed] + [write]
            return write

    def post(self, write: PreparedWrite, notification: bytes) -> None:
        """See :meth:`Transport.post`."""
        with self.fabric.lock:
            self._refuse_closed()
            mine = self._mine(write)
            refusals.check_post(
                mine.peer, notification,
                closed=mine.closed, posted=mine.posted, failed=mine.error is not None,
            )  # fmt: skip
            if self.fabric.faults(mine.peer).torn_nbytes is None:
                self._refuse_dead(mine.peer)
            mine.posted = True
            mine.notification = notification
            mine.due_s = time.monotonic() + self.fabric.faults(mine.peer).delay_s
            self.progress()

    def wait(self, writes: Sequence[PreparedWrite], *, timeout_s: float) -> None:
        """See :meth:`Transport.wait`."""
        deadline_s = time.monotonic() + timeout_s
        mine = [self._mine(write) for write in writes]
        while True:
            with self.fabric.lock:
                self._refuse_closed()
                self.progress()
                for write in mine:
                    if write.error is not None:
                        raise write.error
                    if write.closed:
                        raise refusals.closed_write(write.peer)
                    write.posted = write.posted and not write.completes(write.due_s is None)
                late = [write.peer for write in mine if write.posted]
            if not late:
                return
            if time.monotonic() >= deadline_s:
                raise refusals.late(late, timeout_s)
            time.sleep(_POLL_S)

    def notify(self, peer: str, message: bytes) -> None:
        """See :meth:`Transport.notify`."""
        with self.fabric.lock:
            self._refuse_closed()
            self._refuse_unknown(peer)
            self._refuse_dead(peer)
            self._deliver(peer, message)

    def notifications(self) -> Mapping[str, Sequence[bytes]]:
        """See :meth:`Transport.notifications`."""
        with self.fabric.lock:
            self._refuse_closed()
            for end in self.fabric.ends.values():
                end.progress()
            inbox = self.fabric.inboxes[self.name]
            self.fabric.inboxes[self.name] = {}
            return inbox

    def close(self) -> None:
        """See :meth:`Transport.close`; peers then find this end dead."""
        with self.fabric.lock:
            self._closed = True
            for write in self._writes:
                write.close()
            self._peers.clear()
            self.fabric.ends.pop(self.name, None)
            self.fabric.inboxes.pop(self.name, None)

    def progress(self) -> None:
        """Land what is due (the other ends call it too).  A lost write stays posted for ever."""
        for write in self._writes:
            if write.due_s is None or time.monotonic() < write.due_s:
                continue
            faults = self.fabric.faults(write.peer)
            if faults.lose_write:
                continue
            write.due_s = None
            if not faults.dead or faults.torn_nbytes is not None:
                _copy(write.ops, write.nbytes if faults.torn_nbytes is None else faults.torn_nbytes)
            if faults.dead:
                write.posted = False
                write.error = refusals.lost_peer(write.peer)
            else:
                self._deliver(write.peer, write.notification)

    def _deliver(self, peer: str, message: bytes) -> None:
        if not self.fabric.faults(peer).lose_notification:
            self.fabric.inboxes[peer].setdefault(self.name, []).append(message)

    def _mine(self, write: PreparedWrite) -> _Write:
        if not isinstance(write, _Write) or write.owner is not self:
            raise refusals.foreign_write(write.peer)
        return write

    def _refuse_closed(self) -> None:
        if self._closed:
            raise refusals.closed_end(self.name)

    def _refuse_unknown(self, peer: str) -> None:
        if peer not in self._peers:
            raise refusals.unknown_peer(peer, self.name)

    def _refuse_dead(self, peer: str) -> None:
        if self.fabric.faults(peer).dead:
            raise refusals.lost_peer(peer)


def _copy(ops: Sequence[WriteOp], nbytes: int) -> None:
    """Copy the first ``nbytes`` bytes of ``ops``, in their order."""
    for op in ops:
        part = min(op.nbytes, nbytes)
        if part <= 0:
            return
        ctypes.memmove(op.remote_addr, op.local_addr, part)
        nbytes -= part
