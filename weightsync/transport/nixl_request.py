"""NIXL's transfer requests of one write.  Does not import NIXL.

UCX copies host memory to another process of the host in the call that posts, so a large write is
as fast as one thread copies.  It goes in parts then, one a thread, each on a UCX worker of its own:
258 MB on two cores took 27 ms that way, 43 as one.  Its last bytes follow alone, with the message.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import numpy as np

from weightsync.layout import MemoryKind
from weightsync.transport.base import Side, WriteOp
from weightsync.transport.nixl_errors import is_done

T = TypeVar("T")

#: of host memory; what is smaller goes whole
_LEAST_PARTED_NBYTES = 16 << 20
#: more would only share the rate of the memory
_MOST_THREADS = 4
#: that follow all parts
_TAIL_NBYTES = 64


def copying_threads() -> int:
    """How many threads copy host memory well here: one a CPU, a few at most."""
    return min(len(os.sched_getaffinity(0)), _MOST_THREADS)


class Threads:
    """Threads that stay: NIXL gives each its own of an agent's UCX workers, the first time.

    Args:
        count: How many; 1: whoever calls.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        names = [f"weightsync-copy-{k}" for k in range(count if count > 1 else 0)]
        self._each = [ThreadPoolExecutor(1, name) for name in names]

    def on(self, k: int, call: Callable[[], T]) -> T:
        """What the call returns or raises, made by one of the threads."""
        return self._each[k % self.count].submit(call).result() if self._each else call()

    def each(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Make the calls at the same time; all have ended when this returns, or raises."""
        if not self._each:
            return [call() for call in calls]
        running = [self._each[k % self.count].submit(call) for k, call in enumerate(calls)]
        try:
            wait(running)
        finally:  # Ctrl-C, too, comes after what they do with memory that is about to be let go
            wait(running)
        return [one.result() for one in running]

    def close(self) -> None:
        """End them; they are idle."""
        for one in self._each:
            one.shutdown(wait=False)


class Request:
    """Prepared once, posted any number of times.

    Args:
        nixl: The binding.
        agent: Returns the one whose it is.  No request keeps it, nor does a frame that an error
            keeps: it is to end when its transport lets go of it.
        threads: Of that agent, which has as many workers.
        peer, ops, local, remote: See :meth:`weightsync.transport.base.Transport.prepare`.

    Raises:
        Exception: NIXL's.
    """

    def __init__(
        self,
        nixl: Any,
        agent: Callable[[], Any],
        threads: Threads,
        peer: str,
        ops: Sequence[WriteOp],
        local: Side,
        remote: Side,
    ) -> None:
        self._agent = agent
        self._threads = threads
        self._peer = peer
        #: those of the parts, then the one that carries the message
        self._handles: list[int] = []
        self._pending: list[int] = []
        #: of a post whose last bytes have not been posted
        self._message = b""
        on_host = local.kind == remote.kind == "DRAM"
        large = sum(op.nbytes for op in ops) >= _LEAST_PARTED_NBYTES
        parts = split(ops, threads.count) if on_host and large and threads.count > 1 else [ops]
        try:
            for k, part in enumerate(parts):
                here = nixl.nixlXferDList(segment(nixl, local.kind), _rows_of(part, local, 0))
                there = nixl.nixlXferDList(segment(nixl, remote.kind), _rows_of(part, remote, 1))
                create = partial(self._call, "createXferReq", nixl.NIXL_WRITE, here, there)
                self._handles.append(threads.on(k, partial(create, peer, b"", [])))
        except BaseException:
            with suppress(Exception):  # the first error is the one to tell
                self.release()
            raise

    def post(self, message: bytes) -> None:
        """Start it; ``is_done`` must be asked until it says so, or nothing may be told."""
        *parts, end = self._handles
        if not parts:
            self._posted(end, message)
            return
        self._threads.each([partial(self._posted, part, b"") for part in parts])
        self._pending, self._message = parts, message

    def is_done(self) -> bool:
        """Whether all bytes are in place and the message has gone."""
        if not self._message:
            return self._completed(self._handles[-1])
        self._pending = [part for part in self._pending if not self._completed(part)]
        if self._pending:
            return False
        message, self._message = self._message, b""
        return self._posted(self._handles[-1], message)  # who sees it sees all bytes (WS-2)

    def release(self) -> None:
        """Give it up; what is in flight and cannot be cancelled is tried again the next time.

        Raises:
            Exception: NIXL's, the first of them.
        """
        handles, self._handles = self._handles, []
        errors: list[Exception] = []
        for handle in handles:
            try:
                self._call("releaseXferReq", handle)
            except Exception as error:
                errors.append(error)
                self._handles.append(handle)
        if errors:
            raise errors[0]

    def _posted(self, handle: int, message: bytes) -> bool:
        return is_done(self._call("postXferReq", handle, message).name, self._peer)

    def _completed(self, handle: int) -> bool:
        return is_done(self._call("getXferStatus", handle).name, self._peer)

    def _call(self, name: str, *args: object) -> Any:
        return getattr(self._agent(), name)(*args)


def split(ops: Sequence[WriteOp], count: int) -> list[list[WriteOp]]:
    """The same bytes: ``count`` parts of one size or nearly so, then the last few."""
    tail = min(_TAIL_NBYTES, ops[-1].nbytes)
    left = sum(op.nbytes for op in ops) - tail
    share = max(-(-left // count), 1)
    parts: list[list[WriteOp]] = []
    room = 0
    for op in ops:
        at = 0
        while left and at < op.nbytes:
            if not room:
                parts.append([])
                room = share
            nbytes = min(op.nbytes - at, room, left)
            parts[-1].append(_cut(op, at, nbytes))
            at, room, left = at + nbytes, room - nbytes, left - nbytes
    return [*parts, [_cut(ops[-1], ops[-1].nbytes - tail, tail)]]


def segment(nixl: Any, kind: MemoryKind) -> Any:
    """NIXL's word for a kind of memory."""
    return nixl.VRAM_SEG if kind == "VRAM" else nixl.DRAM_SEG


def rows(of: Sequence[tuple[int, int, int]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Addresses, bytes and devices, as NIXL takes them."""
    return np.array(of, dtype=np.uint64).reshape(-1, 3)


def _rows_of(ops: Sequence[WriteOp], side: Side, end: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    return rows([((op.local_addr, op.remote_addr)[end], op.nbytes, side.device_id) for op in ops])


def _cut(op: WriteOp, at: int, nbytes: int) -> WriteOp:
    return WriteOp(op.local_addr + at, op.remote_addr + at, nbytes)
