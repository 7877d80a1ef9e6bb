from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.transport.host_cuda import HostCarrier, HostCuda, HostEnd, HostNixl
from weightsync.transport import (
    CudaIpcTransport,
    Fabric,
    Faults,
    InMemoryTransport,
    LocalMemory,
    NixlTransport,
    Transport,
    UcxxTransport,
    nixl_request,
)
from weightsync.transport.base import Side

#: with host memory in a GPU's place
HOST_CUDA = {"cuda_ipc_host", "cuda_ipc_host_nixl"}


class GpuBytes:
    """Device memory that looks like an array of numpy's, as far as the tests of transports do."""

    def __init__(self, nbytes: int) -> None:
        self.tensor = torch.zeros(nbytes, dtype=torch.uint8, device="cuda:0")
        self.nbytes = nbytes
        self.ctypes = SimpleNamespace(data=self.tensor.data_ptr())
        torch.cuda.synchronize()

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self.tensor.cpu().numpy()

    def any(self) -> bool:
        return np.asarray(self).any()

    def __getitem__(self, key):
        return np.asarray(self)[key]

    def __setitem__(self, key, value) -> None:
        array = np.asarray(self)
        array[key] = value
        self.tensor.copy_(torch.from_numpy(array))
        torch.cuda.synchronize()

    def __eq__(self, other):
        return np.asarray(self) == other

    __hash__ = None


class OnGpus(CudaIpcTransport):
    """Writes within the first GPU."""

    def prepare(self, peer, ops, **_):
        return super().prepare(peer, ops, local=Side("VRAM", 0), remote=Side("VRAM", 0))


class Wire:
    """Makes ends of one transport for a test, and closes them after it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.fabric = Fabric()
        self.ends: list[Transport] = []
        self.kept: list[np.ndarray] = []

    def end(self) -> Transport:
        if self.kind == "inmemory":
            return self._keep(InMemoryTransport(self.fabric))
        if self.kind == "cuda_ipc_host":
            return self._keep(HostEnd(HostCarrier(self.fabric)))
        return self._keep(_MAKERS[self.kind]("test"))

    def stalled_end(self) -> Transport:
        """An end at which no write ever completes."""
        if self.kind in {"inmemory", "cuda_ipc_host"}:
            end = self.end()
            self.fabric.inject(end.name, Faults(lose_write=True))
            return end
        return self._keep(_MAKERS[self.kind]("stalled", progress_thread=False))

    def memory(self, end: Transport, nbytes: int) -> np.ndarray:
        """Registered zeros that live as long as the test."""
        if self.kind == "cuda_ipc":
            on_gpu = GpuBytes(nbytes)
            self.kept.append(on_gpu)
            end.register([LocalMemory(on_gpu.ctypes.data, nbytes, "VRAM", 0)])
            return on_gpu
        array = np.zeros(nbytes, np.uint8)
        self.kept.append(array)
        kind = "VRAM" if self.kind in HOST_CUDA else "DRAM"
        end.register([LocalMemory(array.ctypes.data, nbytes, kind)])
        return array

    def _keep(self, end: Transport) -> Transport:
        self.ends.append(end)
        return end

    def receive(self, end: Transport, count: int, timeout_s: float = 10.0) -> dict[str, list]:
        """The first ``count`` notifications of ``end`` by sender."""
        deadline_s = time.monotonic() + timeout_s
        got: dict[str, list[bytes]] = {}
        while sum(map(len, got.values())) < count and time.monotonic() < deadline_s:
            for sender, messages in end.notifications().items():
                got.setdefault(sender, []).extend(messages)
            time.sleep(0.0005)
        return got


_MAKERS = {
    "nixl": NixlTransport,
    "nixl_threads": partial(NixlTransport, threads=3),
    "ucxx": UcxxTransport,
    "cuda_ipc_host_nixl": lambda *args, **options: HostEnd(HostNixl(*args, **options)),
    "cuda_ipc": lambda *args, **options: OnGpus(NixlTransport(*args, **options)),
}


@pytest.fixture(
    params=[
        "inmemory",
        pytest.param("nixl", marks=pytest.mark.nixl),
        pytest.param("nixl_threads", marks=pytest.mark.nixl),
        pytest.param("ucxx", marks=pytest.mark.integrations),
        "cuda_ipc_host",
        pytest.param("cuda_ipc_host_nixl", marks=pytest.mark.nixl),
        pytest.param("cuda_ipc", marks=[pytest.mark.nixl, pytest.mark.gpu]),
    ]
)
def wire(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    wire = Wire(request.param)
    if request.param == "nixl_threads":  # whatever is written goes in parts
        monkeypatch.setattr(nixl_request, "_LEAST_PARTED_NBYTES", 1)
    cuda = HostCuda()
    with cuda.in_place() if request.param in HOST_CUDA else nullcontext():
        yield wire
        for end in wire.ends:
            end.close()
    assert not cuda.opened
