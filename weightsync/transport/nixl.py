"""One-sided writes with NIXL over UCX.  The only file that imports NIXL, and it does so late.

What NIXL 1.5 does, and what follows from it here (seen in its source and in runs):

- *Order.*  A transfer's notification leaves the writer only after every descriptor and a flush of
  the endpoint have completed, so who sees it sees all bytes.  It is sent out of the status call
  that finds the data complete: a write that is posted and never waited for may never notify.
- *A repost without a message repeats the last one*, so ``post`` refuses an empty notification.
- *Progress.*  Without RDMA hardware the target's CPU takes part: with no progress thread a write
  completes only once the target's Python code polls.  NIXL's Python wrapper makes that thread
  spin (one core, idle).  Given an interval it sleeps on file descriptors instead: 0.4% of a core
  at the default 10 ms, and a small write still takes 0.3 ms since an event wakes it.  So it is on
  by default and the binding is used directly.  An end that only writes is better without: waiting
  polls, and the copy takes half the CPU.
- *One handle a peer*, but for large writes of host memory (``nixl_request.py``).  10,000
  descriptors cost 1 ms to prepare as one request, 0.3 ms as prepared lists; posting costs the same,
  so the form with one handle to release is used.  On TCP that many descriptors run at a sixth of
  the rate of one: merge writes.
- *Damaged metadata* makes NIXL refuse the right one of that peer for ever after, so a checksum
  stands in front of it.  The sender's name in a notification is what the sender says: it is no
  authentication.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import threading
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from weightsync.errors import PeerLostError, RegistrationError, TransportError
from weightsync.transport import refusals, ucx
from weightsync.transport.base import (
    DRAM,
    LocalMemory,
    PreparedWrite,
    Registration,
    Side,
    Transport,
    WriteOp,
)
from weightsync.transport.nixl_errors import logged, translated
from weightsync.transport.nixl_request import Request, Threads, rows, segment
from weightsync.transport.registry import RegisteredMemory

logger = logging.getLogger(__name__)

_MAGIC = b"weightsync-nixl-1:"
_POLL_MIN_S = 20e-6
_POLL_MAX_S = 500e-6


def load_bindings() -> Any:
    """NIXL's binding module.

    Raises:
        TransportError: NIXL is not installed, or does not load.
    """
    try:
        importlib.import_module("nixl")  # picks the build that fits this machine's CUDA
        return importlib.import_module("nixl._bindings")
    except (ImportError, OSError, RuntimeError) as error:
        raise TransportError(
            f"NIXL cannot be loaded: {error}",
            hint="pip install nixl-cu13 nixl (Linux), or choose another transport",
        ) from error


class _Registration(Registration):
    def __init__(
        self, owner: NixlTransport, memory: Sequence[LocalMemory], lists: list[Any]
    ) -> None:
        self.memory = tuple(memory)
        self.lists = lists
        self._owner = owner

    def close(self) -> None:
        self._owner.unregister(self)


class _Write(PreparedWrite):
    def __init__(
        self, owner: NixlTransport, peer: str, ops: Sequence[WriteOp], request: Request
    ) -> None:
        self.peer = peer
        self.nbytes = sum(op.nbytes for op in ops)
        self.descriptors = len(ops)
        self.request = request
        self.closed = False
        self.posted = False
        #: what ended it; it cannot be posted again
        self.error: TransportError | None = None
        self.owner = owner

    def close(self) -> None:
        self.owner.release(self)


class NixlTransport(Transport):
    """One NIXL agent with its UCX backend.  Create few: each takes half a second and some memory.

    After a deadline a write may still be landing: close it here; at the far end only ``close``
    keeps it out over TCP, neither removing the peer nor deregistering does (docs/failure-model.md).

    Args:
        label: Start of the name, for people; a uuid follows, so a name is never used twice (WS-8).
        progress_thread: Let NIXL make progress while Python is busy.  A target needs it; pass
            False for an end that only writes.
        progress_interval_us: Longest sleep of that thread, 1000 or more; an event ends it.
        gpu: PCI address of the GPU whose NICs and CPUs it uses; None: it moves host memory.
        threads: How many copy a large write of host memory, each with a UCX worker of its own.

    Raises:
        TransportError: NIXL cannot be loaded, or UCX does not start.
        InputError: ``WEIGHTSYNC_NICS`` is wrong.
    """

    def __init__(
        self,
        label: str = "weightsync",
        *,
        progress_thread: bool = True,
        progress_interval_us: int = 10_000,
        gpu: str | None = None,
        threads: int = 1,
    ) -> None:
        self.name = f"{label}-{uuid.uuid4().hex}"
        self._nixl = load_bindings()
        self._lock = threading.RLock()
        self._registered = RegisteredMemory()
        self._registrations: set[_Registration] = set()
        self._writes: set[_Write] = set()
        self._unreleased: list[Request] = []
        self._threads = Threads(threads)
        self._peers: set[str] = set()
        self._lost: set[str] = set()
        self._lost_any = False
        config = self._nixl.nixlAgentConfig()
        config.useProgThread = progress_thread
        config.useListenThread = False
        # One lock of ours guards every call, so NIXL needs one only for those of our threads.
        sync = self._nixl.NIXL_THREAD_SYNC_RW if threads > 1 else self._nixl.NIXL_THREAD_SYNC_NONE
        config.syncMode = sync
        config.pthrDelay = max(progress_interval_us, 1000)

        def make() -> Any:
            with translated("starting the agent"):
                agent = self._nixl.nixlAgent(self.name, config)
                agent.createBackend("UCX", {"num_workers": str(threads)})
                return agent

        self._agent: Any = ucx.start(make, gpu)

    def register(self, memory: Sequence[LocalMemory]) -> Registration:
        """See :meth:`Transport.register`.  A segment is one interval: no write may span two."""
        with self._lock:
            self._refuse_closed()
            self._registered.add(memory)
            registration = _Registration(self, memory, [])
            try:
                for kind in sorted({one.kind for one in memory}):
                    some = [(m.addr, m.nbytes, m.device_id) for m in memory if m.kind == kind]
                    nbytes = sum(row[1] for row in some)
                    descriptors = self._nixl.nixlRegDList(segment(self._nixl, kind), rows(some))
                    with translated(f"registering {nbytes} bytes of {kind}"):
                        self._agent.registerMem(descriptors, [])
                    registration.lists.append(descriptors)
            except TransportError as error:
                self._deregister(registration)
                raise RegistrationError(
                    error.message,
                    hint="the memory must be mapped, pinnable and not from expandable segments",
                ) from error
            self._registrations.add(registration)
            return registration

    def unregister(self, registration: _Registration) -> None:
        """Undo ``register``; never raises, does nothing the second time."""
        with self._lock:
            if registration in self._registrations:
                self._registrations.remove(registration)
                self._deregister(registration)

    def metadata(self, of: Sequence[LocalMemory] | None = None) -> bytes:
        """See :meth:`Transport.metadata`.

        A peer's UCX maps GPU memory of its host as soon as it hears of it, and keeps it mapped
        until its process ends, whatever becomes of this one.
        """
        with self._lock, translated("reading the metadata"):
            self._refuse_closed()
            blob: bytes
            if of is None:
                blob = self._agent.getLocalMD()
            else:
                kind = of[0].kind if of else "DRAM"
                told = rows([(one.addr, one.nbytes, one.device_id) for one in of])
                descriptors = self._nixl.nixlRegDList(segment(self._nixl, kind), told)
                blob = self._agent.getLocalPartialMD(descriptors, True, [])
        return _MAGIC + zlib.crc32(blob).to_bytes(4, "big") + blob

    def add_peer(self, metadata: bytes) -> str:
        """See :meth:`Transport.add_peer`; newer metadata of a known peer adds to the old.

        Raises:
            PeerLostError: The peer was lost before and has not been removed since.
        """
        blob = metadata[len(_MAGIC) + 4 :]
        if metadata[: len(_MAGIC) + 4] != _MAGIC + zlib.crc32(blob).to_bytes(4, "big"):
            raise TransportError(
                f"{len(metadata)} bytes are no NIXL metadata of weightsync, or are damaged",
                hint="hand over what the peer's metadata() returned, unchanged",
            )
        with self._lock:
            self._refuse_closed()
            with translated("loading a peer's metadata"):
                peer = self._agent.loadRemoteMD(blob).decode()
            if peer in self._lost:
                raise refusals.lost_peer(peer)
            self._peers.add(peer)
            return str(peer)

    def remove_peer(self, peer: str) -> None:
        """See :meth:`Transport.remove_peer`; releases the writes to it first.

        UCX closes the connection in the background, so adding the same peer again at once may
        find it lost.  To refresh a peer call ``add_peer`` without removing it.
        """
        with self._lock:
            if peer not in self._peers:
                return
            for write in [write for write in self._writes if write.peer == peer]:
                self.release(write)
            self._peers.discard(peer)
            self._lost.discard(peer)
            with logged(f"removing peer {peer!r}"):
                self._agent.invalidateRemoteMD(peer)

    def prepare(
        self, peer: str, ops: Sequence[WriteOp], *, local: Side = DRAM, remote: Side = DRAM
    ) -> PreparedWrite:
        """See :meth:`Transport.prepare`."""
        with self._lock:
            self._refuse_closed()
            self._refuse_unknown(peer)
            if not ops:
                raise refusals.no_writes(peer)
            self._registered.check("local", local, peer, ((o.local_addr, o.nbytes) for o in ops))
            with translated(f"preparing {len(ops)} writes", peer):
                request = Request(
                    self._nixl, lambda: self._agent, self._threads, peer, ops, local, remote
                )
            write = _Write(self, peer, ops, request)
            self._writes.add(write)
            return write

    def post(self, write: PreparedWrite, notification: bytes) -> None:
        """See :meth:`Transport.post`.  The whole copy may happen in here; the GIL is released."""
        with self._lock:
            self._refuse_closed()
            mine = self._mine(write)
            refusals.check_post(
                mine.peer, notification,
                closed=mine.closed, posted=mine.posted, failed=mine.error is not None,
            )  # fmt: skip
            self._refuse_unknown(mine.peer)
            with self._tracked(mine, "posting a write"):
                mine.request.post(notification)
            # Complete or not: what was posted must be waited for (WS-3).
            mine.posted = True

    def wait(self, writes: Sequence[PreparedWrite], *, timeout_s: float) -> None:
        """See :meth:`Transport.wait`.

        The first failure is raised at once; the other writes stay posted and may be waited for.
        """
        deadline_s = time.monotonic() + timeout_s
        pending = [self._mine(write) for write in writes]
        pause_s = _POLL_MIN_S
        while True:
            pending = [write for write in pending if not self._settled(write)]
            if not pending:
                return
            if time.monotonic() >= deadline_s:
                raise refusals.late((write.peer for write in pending), timeout_s)
            # WS-6: sleeps, since a spinning writer steals the core that the copy runs on.
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, _POLL_MAX_S)

    def _settled(self, write: _Write) -> bool:
        with self._lock:
            self._refuse_closed()
            if write.error is not None:
                raise write.error
            if write.closed:
                raise refusals.closed_write(write.peer)
            if write.posted:
                with self._tracked(write, "waiting for a write"):
                    write.posted = not write.completes(write.request.is_done())
            return not write.posted

    @contextmanager
    def _tracked(self, write: _Write, doing: str) -> Iterator[None]:
        """Keep what goes wrong with a write, and which peer is lost."""
        try:
            with translated(doing, write.peer):
                yield
        except TransportError as error:
            write.posted = False
            write.error = error
            if isinstance(error, PeerLostError):
                self._lost.add(write.peer)
                self._lost_any = True
            raise

    def notify(self, peer: str, message: bytes) -> None:
        """See :meth:`Transport.notify`."""
        with self._lock:
            self._refuse_closed()
            self._refuse_unknown(peer)
            with translated("sending a notification", peer):
                # on a thread of ours: NIXL remembers a worker for each thread that needs one
                self._threads.on(0, lambda: self._agent.genNotif(peer, message))

    def notifications(self) -> Mapping[str, Sequence[bytes]]:
        """See :meth:`Transport.notifications`.  Waits while another thread is in ``post``."""
        with self._lock, translated("reading notifications"):
            self._refuse_closed()
            received: dict[str, list[bytes]] = self._agent.getNotifs({}, [])
            return received

    def release(self, write: _Write) -> None:
        """Give up a write; never raises, does nothing the second time."""
        with self._lock:
            if write.closed or self._agent is None:
                return
            write.closed = True
            self._writes.discard(write)
            try:
                write.request.release()
            except Exception as error:
                # In flight and not cancellable: try again once everything else is closed.
                logger.warning("write to %s not released yet: %s", write.peer, error)
                self._unreleased.append(write.request)

    def close(self) -> None:
        """See :meth:`Transport.close`.  Logs what fails and goes on; never hides an error."""
        with self._lock:
            if self._agent is None:
                return
            for write in list(self._writes):
                self.release(write)
            for peer in list(self._peers):
                self.remove_peer(peer)
            for request in self._unreleased:
                with logged("releasing a write"):
                    request.release()
            for registration in list(self._registrations):
                self.unregister(registration)
            if self._lost_any:
                # UCX now and then aborts the whole process when it shuts down a worker whose
                # endpoint has failed (seen after a peer was killed): never shut that one down.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._agent))
            # Nothing else may hold the agent, least of all a frame that an error keeps: UCX shuts
            # down here, not whenever the garbage collector comes by.
            self._agent = None
            self._unreleased.clear()
            self._threads.close()

    def _refuse_closed(self) -> None:
        if self._agent is None:
            raise refusals.closed_end(self.name)

    def _deregister(self, registration: _Registration) -> None:
        self._registered.remove(registration.memory)
        for descriptors in registration.lists:
            with logged("deregistering memory"):
                self._agent.deregisterMem(descriptors, [])

    def _mine(self, write: PreparedWrite) -> _Write:
        if not isinstance(write, _Write) or write.owner is not self:
            raise refusals.foreign_write(write.peer)
        return write

    def _refuse_unknown(self, peer: str) -> None:
        if peer in self._lost:
            raise refusals.lost_peer(peer)
        if peer not in self._peers:
            raise refusals.unknown_peer(peer, self.name)
