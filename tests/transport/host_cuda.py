"""CUDA's part of the ``cuda_ipc`` transport over host memory: what its own code does is tested so.

Memory that is registered as a GPU's is the host's here, an allocation a registration; a process's
handle of it is its address.  Copies are made when somebody looks whether they are.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from unittest.mock import patch

import torch

from weightsync.errors import TransportError
from weightsync.transport import (
    CudaIpcTransport,
    InMemoryTransport,
    LocalMemory,
    NixlTransport,
    cuda_ipc,
)
from weightsync.transport.base import DRAM, Side
from weightsync.transport.cuda_driver import Allocation, Batch

GPU = Side("VRAM", 0)


class HostCuda:
    """Stands in for driver and device.

    Attributes:
        stuck: No copy ends.
        takes_s: Seconds from the post to the end of the copies.
        looks: At whether copies have ended.
        unmappable: No memory can be mapped.
        opened: Allocations that are mapped, each as often as it is.
    """

    def __init__(self) -> None:
        self.stuck = False
        self.takes_s = 0.0
        self.looks = 0
        self.unmappable = False
        self.opened: list[int] = []
        cuda = self

        class Stream:
            def __init__(self) -> None:
                self.queued: list[tuple[int, int, int]] = []

        class Event:
            def record(self, stream: Stream) -> None:
                self.stream = stream
                self.ends_s = time.monotonic() + cuda.takes_s

            def query(self) -> bool:
                cuda.looks += 1
                over = time.monotonic() >= self.ends_s and not cuda.stuck
                while self.stream.queued and over:
                    ctypes.memmove(*self.stream.queued.pop())
                return not self.stream.queued

        self.stream, self.event = Stream, Event

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Everything that the transport asks CUDA for is asked of this."""
        driver = "weightsync.transport.cuda_driver"
        with ExitStack() as patches:
            for target, name, instead in (
                (torch.cuda, "Stream", self.stream),
                (torch.cuda, "Event", self.event),
                (torch.cuda, "device", lambda _: nullcontext()),
                (torch.cuda, "current_device", lambda: 0),
                (Batch, "of_addresses", Batch),
                (Batch, "queue", _queue),
            ):
                patches.enter_context(patch.object(target, name, instead))
            for name in ("export", "map_here", "check_version", "call"):
                patches.enter_context(patch(f"{driver}.{name}", getattr(self, name)))
            yield

    def export(self, memory: Sequence[LocalMemory]) -> tuple[Allocation, ...]:
        ordered = sorted(memory, key=lambda m: m.addr)
        return tuple(Allocation(m.addr, m.nbytes, b"%d" % m.addr) for m in ordered)

    def map_here(self, allocation: Allocation) -> int:
        if self.unmappable:
            raise TransportError("cuIpcOpenMemHandle failed: CUDA_ERROR_MAP_FAILED")
        self.opened.append(int(allocation.handle))
        return self.opened[-1]

    def check_version(self) -> None:
        """Every version will do."""

    def call(self, name: str, addr: int) -> tuple[()]:
        assert name == "cuIpcCloseMemHandle"
        self.opened.remove(addr)
        return ()


def _queue(batch: Batch, stream: object) -> None:
    stream.queued.extend(zip(batch.to, batch.of, batch.sizes, strict=True))


class HostCarrier(InMemoryTransport):
    """Knows no GPU: what is said to be one's is the host's."""

    def register(self, memory):
        return super().register(_on_host(memory))

    def prepare(self, peer, ops, *, local=DRAM, remote=DRAM):
        return super().prepare(peer, ops)


class HostNixl(NixlTransport):
    """The same of NIXL."""

    def register(self, memory):
        return super().register(_on_host(memory))

    def metadata(self, of=None):
        return super().metadata(None if of is None else _on_host(of))

    def prepare(self, peer, ops, *, local=DRAM, remote=DRAM):
        return super().prepare(peer, ops)


def _on_host(memory):
    return [LocalMemory(m.addr, m.nbytes) for m in memory]


class HostEnd(CudaIpcTransport):
    """As if each end were in a process of its own, and all of its writes from GPU to GPU."""

    def metadata(self, of=None) -> bytes:
        with patch.object(cuda_ipc, "_PROCESS", self.name):
            return super().metadata(of)

    def prepare(self, peer, ops, *, local=GPU, remote=GPU):
        return super().prepare(peer, ops, local=local, remote=remote)
