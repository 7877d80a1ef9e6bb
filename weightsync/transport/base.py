"""What every transport does.  Pure declarations: no NIXL, no torch.

A transport is one end of the wire, in one process.  Its owner registers memory, exchanges
metadata out of band, prepares writes once an epoch and posts them again each push.

Threads: a transport is used by one thread at a time, except ``notifications`` and ``close``.
"""

from __future__ import annotations

import abc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from weightsync.closing import Closing
from weightsync.layout import MemoryKind


@dataclass(frozen=True, slots=True)
class LocalMemory:
    """Memory of this process: address, length in bytes, kind, device (0 for DRAM)."""

    addr: int
    nbytes: int
    kind: MemoryKind = "DRAM"
    device_id: int = 0


@dataclass(frozen=True, slots=True)
class WriteOp:
    """One contiguous write: ``nbytes`` from ``local_addr`` here to ``remote_addr`` at the peer."""

    local_addr: int
    remote_addr: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Side:
    """Kind and device of the memory at one end of a prepared write."""

    kind: MemoryKind = "DRAM"
    device_id: int = 0


DRAM = Side()


class Registration(Closing):
    """Registered memory; it must stay mapped until ``close`` (WS-9).  A context manager."""

    @abc.abstractmethod
    def close(self) -> None:
        """Deregister.  Safe to call twice; never hides an earlier error."""


class PreparedWrite(Closing):
    """Writes to one peer, prepared once and posted any number of times.  A context manager."""

    peer: str
    nbytes: int
    descriptors: int
    #: when ``wait`` last saw it complete, by ``time.perf_counter``; 0.0: never, or nobody looked
    completed_at: float = 0.0

    def completes(self, done: bool) -> bool:
        """Note the moment if it is ``done``, which is returned.  For transports."""
        if done:
            self.completed_at = time.perf_counter()
        return done

    @abc.abstractmethod
    def close(self) -> None:
        """Release.  A write still in flight is given up; safe to call twice."""


class Transport(Closing):
    """One end of the wire.  A context manager; ``close`` releases everything that it still owns."""

    #: unique among all transports ever made (WS-8): a name is never used again after a restart
    name: str

    @abc.abstractmethod
    def register(self, memory: Sequence[LocalMemory]) -> Registration:
        """Make this memory readable and writable by the wire.

        Raises:
            RegistrationError: Refused, or a length of zero, or an overlap with registered memory.
        """

    @abc.abstractmethod
    def metadata(self, of: Sequence[LocalMemory] | None = None) -> bytes:
        """What a peer needs to reach this end: to be asked for after the last ``register``.

        Args:
            of: Tell of this memory alone, which is of one kind and was registered as it is; None:
                of all that is registered.  An end that nobody writes to tells of none.
        """

    @abc.abstractmethod
    def add_peer(self, metadata: bytes) -> str:
        """Take in a peer's metadata and return its name.

        Raises:
            TransportError: The bytes are not metadata of this transport.
        """

    @abc.abstractmethod
    def remove_peer(self, peer: str) -> None:
        """Forget a peer.  Unknown peers are ignored."""

    @abc.abstractmethod
    def prepare(
        self, peer: str, ops: Sequence[WriteOp], *, local: Side = DRAM, remote: Side = DRAM
    ) -> PreparedWrite:
        """Prepare the writes of every later push to ``peer``.

        Raises:
            TransportError: Unknown peer, no ops, or memory that is not registered at either end.
            PeerLostError: The peer is gone.
        """

    @abc.abstractmethod
    def post(self, write: PreparedWrite, notification: bytes) -> None:
        """Start the write; when all of it is in place the peer sees ``notification`` (WS-2).

        May block while it copies.  Slots must not be touched before ``wait`` returned (WS-3).

        Raises:
            PeerLostError: The peer is gone.
            TransferFailedError: Posted twice without a ``wait`` between, or refused.
        """

    @abc.abstractmethod
    def wait(self, writes: Sequence[PreparedWrite], *, timeout_s: float) -> None:
        """Wait until every posted write has completed.

        Raises:
            DeadlineError: Not all completed in time; the message names the peers that did not.
            PeerLostError: A peer went away.
            TransferFailedError: The transport gave a write up.
        """

    @abc.abstractmethod
    def notify(self, peer: str, message: bytes) -> None:
        """Send a message on its own.  It is *not* ordered after earlier writes.

        Raises:
            PeerLostError: The peer is gone.
        """

    @abc.abstractmethod
    def notifications(self) -> Mapping[str, Sequence[bytes]]:
        """Messages that came in since the last call, by peer name.  Does not block."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release writes, registrations and the wire.  Safe to call twice."""
