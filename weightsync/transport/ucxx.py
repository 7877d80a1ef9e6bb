"""Writes with ucxx, for hosts without NIXL: the far end's process takes part in each.

The interface is kept; the price is in :mod:`weightsync.transport.ucxx_wire`: a round trip before
the bytes, and a thread at the target.  ``post`` asks, ``wait`` (or the thread) does the rest.
"""

from __future__ import annotations

import atexit
import logging
import secrets
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightsync import codec
from weightsync.errors import DeadlineError, InputError, TransferFailedError, TransportError
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
from weightsync.transport.ucxx_target import Interval, Target, holding, order
from weightsync.transport.ucxx_wire import (
    MAX_OPS,
    Ask,
    Done,
    Go,
    Note,
    Wire,
    pack_ops,
)

logger = logging.getLogger(__name__)

#: the thread looks at least so often: not every wire wakes it
_REST_S = 0.01
_NOTE_S = 5.0


@dataclass(frozen=True, slots=True)
class _Metadata:
    name: str
    address: bytes
    key: bytes
    intervals: tuple[Interval, ...]


@dataclass
class _Peer:
    metadata: _Metadata
    endpoint: Any


class _Registration(Registration):
    def __init__(self, owner: UcxxTransport, intervals: Sequence[Interval]) -> None:
        self._owner = owner
        self.intervals = intervals

    def close(self) -> None:
        self._owner.unregister(self)


@dataclass(eq=False)
class _Write(PreparedWrite):
    owner: UcxxTransport
    peer: str
    nbytes: int
    descriptors: int
    side: Side
    ops: bytes
    memory: list[Any]
    #: of the post that runs; 0: none does
    number: int = 0
    error: TransportError | None = None
    closed: bool = False

    def close(self) -> None:
        with self.owner.lock:
            self.closed = True
            self.number = 0


class UcxxTransport(Transport):
    """One UCX worker.

    Args:
        label: Start of the name, for people; a uuid follows (WS-8).
        progress_thread: A target needs it; pass False for an end that only writes, and waits.
        gpu: PCI address of the GPU whose NICs it uses; None: it moves host memory.

    Raises:
        TransportError: ucxx cannot be loaded, or UCX does not start.
        InputError: ``WEIGHTSYNC_NICS`` is wrong.
    """

    def __init__(
        self, label: str = "weightsync", *, progress_thread: bool = True, gpu: str | None = None
    ) -> None:
        self.name = f"{label}-{uuid.uuid4().hex}"
        self.lock = threading.RLock()
        self._wire = Wire(gpu)
        self._target = Target(self._wire)
        self._registered = RegisteredMemory()
        self._peers: dict[str, _Peer] = {}
        self._writes: list[_Write] = []
        self._closed = False
        self._thread: threading.Thread | None = None
        atexit.register(self.close)
        if progress_thread:
            self._thread = threading.Thread(target=self._run, name="weightsync-ucxx", daemon=True)
            self._thread.start()

    def register(self, memory: Sequence[LocalMemory]) -> Registration:
        """See :meth:`Transport.register`."""
        with self.lock:
            self._refuse_closed()
            self._registered.add(memory)
            return _Registration(self, self._target.add(memory))

    def unregister(self, registration: _Registration) -> None:
        """Forget memory; what is in flight is given up first, all of it (WS-9)."""
        with self.lock:
            if self._closed or not registration.intervals:
                return
            posted = any(write.number for write in self._writes)
            if posted or self._target.busy or self._wire.sending:
                self._give_up()
            for each in registration.intervals:
                del self._target.intervals[each.number]
                self._registered.remove(
                    [LocalMemory(each.addr, each.nbytes, each.kind, each.device_id)]
                )
            registration.intervals = ()

    def metadata(self, of: Sequence[LocalMemory] | None = None) -> bytes:
        """See :meth:`Transport.metadata`; who has it may write here."""
        with self.lock:
            self._refuse_closed()
            told = None if of is None else {(one.addr, one.nbytes) for one in of}
            all_of_it = sorted(self._target.intervals.values(), key=order)
            mine = tuple(i for i in all_of_it if told is None or (i.addr, i.nbytes) in told)
            metadata = _Metadata(self.name, self._wire.address, self._target.key, mine)
            return codec.pack(metadata).encode()

    def add_peer(self, metadata: bytes) -> str:
        """See :meth:`Transport.add_peer`; newer metadata of a known peer replaces the old."""
        try:
            peer = codec.unpack(metadata.decode("ascii", "replace"), _Metadata)
        except InputError as error:
            raise TransportError(
                f"{len(metadata)} bytes are no metadata of a ucxx transport: {error.message}",
                hint="both ends must use the ucxx transport, of the same version",
            ) from error
        with self.lock:
            self._refuse_closed()
            if peer.name == self.name:
                raise refusals.own_metadata(self.name)
            known = self._peers.get(peer.name)
            if known is not None:
                known.metadata = peer
                return peer.name
            try:
                endpoint = self._wire.connect(peer.address)
            except self._wire.error as error:
                raise TransportError(
                    f"cannot reach {peer.name!r}: {error}", hint="is it on this network?"
                ) from error
            self._peers[peer.name] = _Peer(peer, endpoint)
            return peer.name

    def remove_peer(self, peer: str) -> None:
        """See :meth:`Transport.remove_peer`; closes the writes to it."""
        with self.lock:
            for write in self._writes:
                if write.peer == peer:
                    write.close()
            gone = self._peers.pop(peer, None)
            if gone is not None and not self._closed:
                self._wire.disconnect(gone.endpoint)

    def prepare(
        self, peer: str, ops: Sequence[WriteOp], *, local: Side = DRAM, remote: Side = DRAM
    ) -> PreparedWrite:
        """See :meth:`Transport.prepare`."""
        with self.lock:
            there = self._reach(peer).metadata.intervals
            if not ops:
                raise refusals.no_writes(peer)
            if len(ops) > MAX_OPS:
                raise TransportError(f"{len(ops)} writes at once", hint="merge adjacent writes")
            self._registered.check("local", local, peer, ((o.local_addr, o.nbytes) for o in ops))
            places = []
            for op in ops:
                held = holding(there, op.remote_addr, op.nbytes, remote)
                if held is None:
                    raise refusals.not_registered(
                        "remote", remote.kind, op.remote_addr, op.nbytes, peer
                    )
                places.append((held.number, op.remote_addr, op.nbytes))
            memory = [self._wire.memory(op.local_addr, op.nbytes, local) for op in ops]
            write = _Write(
                self, peer, sum(op.nbytes for op in ops), len(ops), remote, pack_ops(places), memory
            )
            self._writes = [kept for kept in self._writes if not kept.closed] + [write]
            return write

    def post(self, write: PreparedWrite, notification: bytes) -> None:
        """See :meth:`Transport.post`; it asks, and does not block."""
        with self.lock:
            self._refuse_closed()
            mine = self._mine(write)
            refusals.check_post(
                mine.peer, notification,
                closed=mine.closed, posted=bool(mine.number), failed=mine.error is not None,
            )  # fmt: skip
            peer = self._reach(mine.peer)
            # no two posts have one number, so a late answer ends no other post (WS-2)
            mine.number = secrets.randbits(62) | 1
            self._wire.say(
                peer.endpoint,
                Ask(
                    mine.number, self.name, self._wire.address, peer.metadata.key, mine.side.kind,
                    mine.side.device_id, mine.ops, bytes(notification),
                ),
            )  # fmt: skip

    def wait(self, writes: Sequence[PreparedWrite], *, timeout_s: float) -> None:
        """See :meth:`Transport.wait`."""
        deadline = time.monotonic() + timeout_s
        mine = [self._mine(write) for write in writes]
        while True:
            with self.lock:
                self._refuse_closed()
                moved = self._pump()
                for write in mine:
                    if write.error is not None:
                        raise write.error
                    if write.closed:
                        raise refusals.closed_write(write.peer)
                    if write.number:
                        self._reach(write.peer)
                late = [write.peer for write in mine if write.number]
            if not late:
                return
            if time.monotonic() >= deadline:
                raise refusals.late(late, timeout_s)
            if not moved:
                self._wire.rest(min(_REST_S, max(deadline - time.monotonic(), 0)))

    def notify(self, peer: str, message: bytes) -> None:
        """See :meth:`Transport.notify`; returns when it has left, or after five seconds."""
        deadline = time.monotonic() + _NOTE_S
        with self.lock:
            there = self._reach(peer)
            note = Note(self.name, there.metadata.key, bytes(message))
            request = self._wire.say(there.endpoint, note)
        while True:
            with self.lock:
                self._reach(peer)
                if request.completed:
                    return
                moved = self._pump()
            if time.monotonic() > deadline:
                raise DeadlineError(
                    f"a message to {peer!r} has not left in {_NOTE_S:g} s",
                    hint="the peer may be stopped",
                    peers=[peer],
                )
            if not moved:
                self._wire.rest(_REST_S)

    def notifications(self) -> Mapping[str, Sequence[bytes]]:
        """See :meth:`Transport.notifications`."""
        with self.lock:
            self._refuse_closed()
            self._pump()
            inbox, self._target.inbox = self._target.inbox, {}
            return inbox

    def close(self) -> None:
        """See :meth:`Transport.close`."""
        with self.lock:
            if self._closed:
                return
            self._closed = True
            atexit.unregister(self.close)
            for write in self._writes:
                write.close()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(5)
        with self.lock:
            self._give_up()
            self._target.close()
            for peer in self._peers.values():
                self._wire.disconnect(peer.endpoint)
            self._peers.clear()

    # ------------------------------------------------------------------ inside

    def _run(self) -> None:
        while not self._closed:
            with self.lock:
                self._wire.use_device()
                moved = not self._closed and self._pump()
            if not moved:
                self._wire.rest(_REST_S)

    def _pump(self) -> bool:
        """Whatever can be done now; whether anything was, or is left to do."""
        messages = self._wire.progress()
        for message in messages:
            try:
                self._take(message)
            except self._wire.error as error:  # of one peer's connection: the others go on
                logger.warning("%s: a peer's message came to nothing: %s", self.name, error)
        return self._target.settle() or bool(messages) or not self._wire.arm()

    def _take(self, message: Ask | Go | Done | Note) -> None:
        match message:
            case Go(number, stream):
                self._send(number, stream)
            case Done(number, why):
                self._end(number, why)
            case _:
                self._target.take(message)

    def _send(self, number: int, stream: int) -> None:
        write = self._posted(number)
        if write is not None and write.peer in self._peers:
            endpoint = self._peers[write.peer].endpoint
            for index, memory in enumerate(write.memory):
                self._wire.send(endpoint, stream, index, memory)

    def _end(self, number: int, why: str) -> None:
        write = self._posted(number)
        if write is None:
            return
        write.number = 0
        if why:
            write.error = TransferFailedError(
                f"{write.peer!r} gave a write up: {why}",
                hint="exchange metadata again, and prepare anew",
                peer=write.peer,
            )

    def _posted(self, number: int) -> _Write | None:
        return next((w for w in self._writes if w.number == number), None)

    def _give_up(self) -> None:
        self._target.give_up()
        for write in self._writes:
            if write.number:
                write.number = 0
                write.error = TransferFailedError(
                    f"a write to {write.peer!r} was given up with its memory",
                    hint="wait for writes before memory is deregistered",
                    peer=write.peer,
                )
        self._wire.cancel()

    def _reach(self, peer: str) -> _Peer:
        self._refuse_closed()
        if peer not in self._peers:
            raise refusals.unknown_peer(peer, self.name)
        if not self._peers[peer].endpoint.alive:
            raise refusals.lost_peer(peer)
        return self._peers[peer]

    def _mine(self, write: PreparedWrite) -> _Write:
        if not isinstance(write, _Write) or write.owner is not self:
            raise refusals.foreign_write(write.peer)
        return write

    def _refuse_closed(self) -> None:
        if self._closed:
            raise refusals.closed_end(self.name)
