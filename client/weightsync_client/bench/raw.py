"""NIXL by itself: its own binding, one handle, and the loop that its documentation shows.

The baseline of our write phase, so nothing of ours is in it but the slab of memory and, where
several write, the threads.
"""

from __future__ import annotations

import base64
import time
import uuid
from functools import partial
from typing import Any

import torch

from weightsync.errors import DeadlineError
from weightsync.slab import Slab
from weightsync.transport.nixl import load_bindings
from weightsync.transport.nixl_errors import is_done, translated
from weightsync.transport.nixl_request import Threads, rows

_WRITE_S = 60.0
_PROGRESS_US = 10_000
_SLEEP_S = 50e-6


class RawNixl:
    """One end: a NIXL agent and one registered slab.

    Args:
        nbytes: Of the slab.
        device: Where it lies.
        target: Whether this end is written to: it then makes progress by itself.
        threads: That write at the same time, each with a UCX worker of its own.
    """

    def __init__(
        self, nbytes: int, device: torch.device, *, target: bool, threads: int = 1
    ) -> None:
        self._nixl = load_bindings()
        self._slab = Slab(nbytes, device)
        self._slab.data.fill_(1)
        self._kind = self._nixl.VRAM_SEG if device.type == "cuda" else self._nixl.DRAM_SEG
        config = self._nixl.nixlAgentConfig()
        config.useProgThread = target
        config.useListenThread = False
        config.pthrDelay = _PROGRESS_US
        workers = 1 if target else threads
        if workers > 1:
            config.syncMode = self._nixl.NIXL_THREAD_SYNC_RW
        self._threads = Threads(workers)
        with translated("starting a NIXL agent"):
            self._agent: Any = self._nixl.nixlAgent(f"raw-{uuid.uuid4().hex}", config)
            self._agent.createBackend("UCX", {"num_workers": str(workers)})
            memory = self._slab.memory
            whole = rows([(memory.addr, memory.nbytes, memory.device_id)])
            self._agent.registerMem(self._nixl.nixlRegDList(self._kind, whole), [])
        self._peer = ""
        self._remote_addr = 0

    def describe(self) -> dict[str, Any]:
        """What :meth:`connect` of the other end takes."""
        return {
            "metadata": base64.b64encode(self._agent.getLocalMD()).decode("ascii"),
            "addr": self._slab.memory.addr,
        }

    def connect(self, metadata: str, addr: int) -> None:
        """Take in the end that will be written to."""
        with translated("loading a peer's metadata"):
            self._peer = self._agent.loadRemoteMD(base64.b64decode(metadata)).decode()
        self._remote_addr = addr

    def write(self, nbytes: int, piece_nbytes: int, repeats: int, *, sleeping: bool) -> list[float]:
        """Seconds, from post to completion, of writing ``nbytes`` in pieces, each time.

        ``sleeping``: it waits as a push does, and leaves its core to the other end meanwhile.

        Raises:
            TransportError: NIXL refuses.
            DeadlineError: It takes longer than a minute.
        """
        share = -(-nbytes // self._threads.count)
        handles: list[int] = []
        with translated("a raw write", self._peer):
            try:
                for k in range(self._threads.count):
                    part = range(k * share, min((k + 1) * share, nbytes), piece_nbytes)
                    handles.append(self._threads.on(k, partial(self._prepare, part)))
                return [self._write(handles, sleeping) for _ in range(repeats)]
            finally:
                for handle in handles:
                    self._agent.releaseXferReq(handle)

    def _prepare(self, part: range) -> int:
        device = self._slab.memory.device_id
        here, there = (
            self._nixl.nixlXferDList(
                self._kind,
                rows([(addr + at, min(part.step, part.stop - at), device) for at in part]),
            )
            for addr in (self._slab.memory.addr, self._remote_addr)
        )
        write = self._nixl.NIXL_WRITE
        return int(self._agent.createXferReq(write, here, there, self._peer, b"", []))

    def _write(self, handles: list[int], sleeping: bool) -> float:
        started = time.perf_counter()
        self._threads.each([partial(self._post, handle, sleeping) for handle in handles])
        return time.perf_counter() - started

    def _post(self, handle: int, sleeping: bool) -> None:
        started = time.perf_counter()
        done = is_done(self._agent.postXferReq(handle, b"").name, self._peer)
        while not done:
            if time.perf_counter() - started > _WRITE_S:
                raise DeadlineError(f"a raw write took longer than {_WRITE_S:g} s")
            if sleeping:
                time.sleep(_SLEEP_S)
            done = is_done(self._agent.getXferStatus(handle).name, self._peer)
