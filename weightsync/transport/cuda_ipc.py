"""Copies between the GPUs of one host, where a writer can map the memory that it writes to.

A target hands out CUDA IPC handles beside its carrier's metadata.  A writer on the same host maps
the allocations and gives the GPU's copy engines all copies in one call.  Between two H200 that
took 11.5 ms for 1600 pieces of 4.3 GB, where one copy after another took 14.9 and UCX 15.3 ms; a
kernel that stores to the other GPU came to three quarters of the link.

A small write to a *pad* of host memory follows every such write with the carrier, posted once all
copies have completed on the device, and it carries the notification.  So a peer sees that only
after all bytes (WS-2), and a peer that is gone, stopped or has deregistered is noticed as the
carrier notices it; its memory is not shut by deregistering, though: an abort waits for writers of
the host to let go (WS-8).  The carrier hears nothing of the GPU memory itself: UCX maps what it
hears of, and keeps a dead engine's memory from the next one until this process ends.

Whatever cannot be mapped goes with the carrier alone, which is told of all memory then: another
host, host memory, expandable segments.  So does what is written from another namespace of pids:
nobody could tell when that writer has ended.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch

from weightsync.errors import DeadlineError, TransferFailedError, TransportError
from weightsync.process import neighbourhood
from weightsync.transport import cuda_driver, refusals
from weightsync.transport.base import (
    DRAM,
    LocalMemory,
    PreparedWrite,
    Registration,
    Side,
    Transport,
    WriteOp,
)
from weightsync.transport.cuda_driver import Batch
from weightsync.transport.cuda_offer import Offer
from weightsync.transport.registry import RegisteredMemory

logger = logging.getLogger(__name__)

#: ``0`` in the environment of either end: its carrier writes everything
SWITCH = "WEIGHTSYNC_CUDA_IPC"

#: of the write that tells of another one's end
_PAD_NBYTES = 64
#: a number of a process may be another's, too, in another container
_PROCESS = uuid.uuid4().hex
_POLL_MIN_S = 20e-6
_POLL_MAX_S = 100e-6
#: that copies in flight get to end in before their memory is let go
_CLOSE_S = 10.0


class _Registration(Registration):
    def __init__(
        self, owner: CudaIpcTransport, memory: Sequence[LocalMemory], of: Registration
    ) -> None:
        self.memory = memory
        self._owner = owner
        self._of = of

    def close(self) -> None:
        self._owner.forget(self)
        self._of.close()


class _Write(PreparedWrite):
    def __init__(
        self,
        owner: CudaIpcTransport,
        stream: torch.cuda.Stream,
        copies: Batch,
        end: PreparedWrite,
    ) -> None:
        self.owner = owner
        self.peer = end.peer
        self.nbytes = copies.nbytes
        self.descriptors = len(copies.sizes)
        self.stream = stream
        self.copies = copies
        self.end = end
        self.copied = torch.cuda.Event()
        #: of the post that runs; empty: none does
        self.message = b""
        self.copying = False
        self.posted_s = 0.0
        #: the shortest time that its copies took; 0: they never ended
        self.best_s = 0.0
        self.error: TransportError | None = None
        self.closed = False

    @property
    def due_s(self) -> float:
        """By the monotonic clock, when its copies end if they take as long as they ever did."""
        return self.posted_s + self.best_s if self.copying else 0.0

    def close(self) -> None:
        self.owner.release(self)


class CudaIpcTransport(Transport):
    """Writes device memory of this host by itself, all else with its carrier.

    After a deadline a write may still be landing, as with the carrier; ``close`` of the write, or
    of its peer, waits for its copies.

    Args:
        carrier: Owned; it has the name.
        environ: For tests.
    """

    def __init__(self, carrier: Transport, *, environ: Mapping[str, str] = os.environ) -> None:
        self.name = carrier.name
        self._carrier = carrier
        self._off = environ.get(SWITCH) == "0"
        self._lock = threading.RLock()
        self._registered: list[_Registration] = []
        #: of the host's memory; registered as long as this end lives
        self._pad: torch.Tensor | None = None
        self._memory = RegisteredMemory()
        self._offers: dict[str, Offer] = {}
        #: those of which the carrier knows all
        self._whole: set[str] = set()
        self._maps: dict[str, dict[tuple[int, int], int]] = {}
        self._writes: set[_Write] = set()
        #: of each peer, so that copies to several go at the same time
        self._streams: dict[tuple[str, int], torch.cuda.Stream] = {}

    def register(self, memory: Sequence[LocalMemory]) -> Registration:
        """See :meth:`Transport.register`."""
        registration = _Registration(self, memory, self._carrier.register(memory))
        with self._lock:
            if self._pad is None and any(one.kind == "VRAM" for one in memory):
                pad = torch.zeros(_PAD_NBYTES, dtype=torch.uint8)
                self._carrier.register([_whole_of(pad)])
                self._pad = pad
            self._registered.append(registration)
            self._memory.add(memory)
        return registration

    def forget(self, registration: _Registration) -> None:
        """Hand its memory out no more."""
        with self._lock:
            if registration in self._registered:
                self._registered.remove(registration)
                self._memory.remove(registration.memory)

    def metadata(self, of: Sequence[LocalMemory] | None = None) -> bytes:
        """See :meth:`Transport.metadata`: the carrier's, and handles where there is GPU memory."""
        whole = self._carrier.metadata(of)
        near = neighbourhood()
        with self._lock:
            registered, pad = list(self._registered), self._pad
        told = [one for each in registered for one in each.memory if of is None or one in of]
        memory = tuple(one for one in told if one.kind == "VRAM")
        allocations = cuda_driver.export(memory)
        if self._off or near is None or pad is None or not allocations:
            return whole
        on_host = [one for one in told if one.kind == "DRAM"]
        carrier = self._carrier.metadata([*on_host, _whole_of(pad)])
        at = pad.data_ptr()
        return Offer(carrier, whole, near, _PROCESS, allocations, memory, at).packed()

    def add_peer(self, metadata: bytes) -> str:
        """See :meth:`Transport.add_peer`."""
        offer = Offer.of(metadata)
        if offer is None:
            return self._carrier.add_peer(metadata)
        if self._off or offer.near != neighbourhood():
            return self._carrier.add_peer(offer.whole)
        peer = self._carrier.add_peer(offer.carrier)
        with self._lock:
            self._offers[peer] = offer
            self._whole.discard(peer)
        return peer

    def remove_peer(self, peer: str) -> None:
        """See :meth:`Transport.remove_peer`; waits for copies to the peer."""
        with self._lock:
            for write in [write for write in self._writes if write.peer == peer]:
                self.release(write)
            self._offers.pop(peer, None)
            self._whole.discard(peer)
            self._streams = {at: s for at, s in self._streams.items() if at[0] != peer}
            for (device, _), addr in self._maps.pop(peer, {}).items():
                with torch.cuda.device(device), suppress(TransportError):
                    cuda_driver.call("cuIpcCloseMemHandle", addr)
        self._carrier.remove_peer(peer)

    def prepare(
        self, peer: str, ops: Sequence[WriteOp], *, local: Side = DRAM, remote: Side = DRAM
    ) -> PreparedWrite:
        """See :meth:`Transport.prepare`."""
        with self._lock:
            offer = self._offers.get(peer)
            if offer is None or remote.kind != "VRAM" or not ops:
                return self._carrier.prepare(peer, ops, local=local, remote=remote)
            if local.kind == "VRAM" and self._pad is not None:
                parts = ((op.local_addr, op.nbytes) for op in ops)
                self._memory.check("local", local, peer, parts)
                offer.check(peer, remote, ops)
                try:
                    with torch.cuda.device(local.device_id):
                        copies = self._mapped(peer, offer, ops)
                except TransportError as error:
                    logger.warning("%s; the carrier writes to %s instead", error, peer)
                else:
                    return self._followed(peer, offer, copies, self._pad, local.device_id)
            if peer not in self._whole:
                self._carrier.add_peer(offer.whole)
                self._whole.add(peer)
            return self._carrier.prepare(peer, ops, local=local, remote=remote)

    def _followed(
        self, peer: str, offer: Offer, copies: Batch, pad: torch.Tensor, device: int
    ) -> _Write:
        """These copies, and the carrier's write behind them."""
        with torch.cuda.device(device):
            stream = self._streams.setdefault((peer, device), torch.cuda.Stream())
        end = self._carrier.prepare(peer, [WriteOp(pad.data_ptr(), offer.pad, _PAD_NBYTES)])
        write = _Write(self, stream, copies, end)
        self._writes.add(write)
        logger.info("CUDA IPC to %s: %d copies", peer, write.descriptors)
        return write

    def _mapped(self, peer: str, offer: Offer, ops: Sequence[WriteOp]) -> Batch:
        """The copies that the current device makes."""
        device = torch.cuda.current_device()
        cuda_driver.check_version()
        known = self._maps.setdefault(peer, {})
        to = []
        for op in ops:
            found = offer.allocation(op)
            here = found.base
            if offer.process != _PROCESS:
                if (device, found.base) not in known:
                    known[device, found.base] = cuda_driver.map_here(found)
                here = known[device, found.base]
            to.append(here + op.remote_addr - found.base)
        return Batch.of_addresses(to, [op.local_addr for op in ops], [op.nbytes for op in ops])

    def post(self, write: PreparedWrite, notification: bytes) -> None:
        """See :meth:`Transport.post`.  Queues the copies; they wait for no work of torch's."""
        if not isinstance(write, _Write):
            self._carrier.post(write, notification)
            return
        with self._lock:
            self._mine(write)
            refusals.check_post(
                write.peer, notification,
                closed=write.closed, posted=bool(write.message), failed=write.error is not None,
            )  # fmt: skip
            write.message = notification
            write.posted_s = time.monotonic()
            write.copying = True
            try:
                write.copies.queue(write.stream)
            except TransportError as error:
                write.error = error
                raise
            finally:
                write.copied.record(write.stream)

    def wait(self, writes: Sequence[PreparedWrite], *, timeout_s: float) -> None:
        """See :meth:`Transport.wait`."""
        deadline_s = time.monotonic() + timeout_s
        mine = [write for write in writes if isinstance(write, _Write)]
        theirs = [write for write in writes if not isinstance(write, _Write)]
        pause_s = _POLL_MIN_S
        while mine:
            mine = [write for write in mine if not self._settled(write)]
            theirs = self._pending(theirs) if theirs else theirs
            now_s = time.monotonic()
            if now_s >= deadline_s and (mine or theirs):
                raise refusals.late((write.peer for write in [*mine, *theirs]), timeout_s)
            if mine:
                # A look takes CPU time from the trainer: there are few before the end is near.
                # But a carrier makes progress only while it is looked at.
                due_s = 0.0 if theirs else min(write.due_s for write in mine)
                rest_s = min((due_s - now_s) / 2, deadline_s - now_s)
                time.sleep(max(rest_s, pause_s))
                pause_s = min(pause_s * 2, _POLL_MAX_S)
        if theirs:
            self._carrier.wait(theirs, timeout_s=max(deadline_s - time.monotonic(), 0.0))

    def _settled(self, write: _Write) -> bool:
        with self._lock:
            self._mine(write)
            if write.error is not None:
                raise write.error
            if write.closed:
                raise refusals.closed_write(write.peer)
            if not write.message:
                return True
            try:
                if write.copying:
                    if not _has_copied(write):
                        return False
                    write.copying = False
                    took_s = time.monotonic() - write.posted_s
                    write.best_s = min(write.best_s or took_s, took_s)
                    self._carrier.post(write.end, write.message)
                if self._pending([write.end]):
                    return False
            except TransportError as error:
                write.error = error
                raise
            write.message = b""
            return write.completes(True)

    def _pending(self, writes: Sequence[PreparedWrite]) -> list[PreparedWrite]:
        """Those of the carrier's that have not completed."""
        try:
            self._carrier.wait(writes, timeout_s=0)
        except DeadlineError as error:
            peers = error.context["peers"]
            return [write for write in writes if write.peer in peers]
        return []

    def notify(self, peer: str, message: bytes) -> None:
        """See :meth:`Transport.notify`."""
        self._carrier.notify(peer, message)

    def notifications(self) -> Mapping[str, Sequence[bytes]]:
        """See :meth:`Transport.notifications`."""
        return self._carrier.notifications()

    def release(self, write: _Write) -> None:
        """Give a write up, once its copies have ended; never raises, does nothing twice."""
        with self._lock:
            if write.closed:
                return
            write.closed = True
            self._writes.discard(write)
            deadline_s = time.monotonic() + _CLOSE_S
            with suppress(TransportError):
                while write.copying and not _has_copied(write):
                    if time.monotonic() > deadline_s:
                        logger.error("copies to %s have not ended in %g s", write.peer, _CLOSE_S)
                        break
                    time.sleep(_POLL_MAX_S)
            write.end.close()

    def close(self) -> None:
        """See :meth:`Transport.close`."""
        with self._lock:
            for peer in list(self._offers):
                self.remove_peer(peer)
            self._registered.clear()
        self._carrier.close()

    def _mine(self, write: _Write) -> None:
        if write.owner is not self:
            raise refusals.foreign_write(write.peer)


def _has_copied(write: _Write) -> bool:
    """Whether all copies have completed, at the far end too: an event follows them."""
    try:
        return bool(write.copied.query())
    except RuntimeError as error:  # torch's, for whatever CUDA says
        raise TransferFailedError(
            f"copies to {write.peer!r} failed: {error}",
            hint="CUDA refuses all later calls of this process after most errors: look at its log",
            peer=write.peer,
        ) from error


def _whole_of(pad: torch.Tensor) -> LocalMemory:
    return LocalMemory(pad.data_ptr(), _PAD_NBYTES)
