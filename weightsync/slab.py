"""Memory for the wire: one allocation, whole pages, that stays where it is."""

from __future__ import annotations

import ctypes
import math

import torch

from weightsync.errors import RegistrationError
from weightsync.transport.base import LocalMemory

#: slabs start at this many bytes: a page, which RDMA NICs register whole
ALIGN_NBYTES = 4096


class Slab:
    """One contiguous allocation that stays where it is until ``close`` (WS-9).

    On a GPU the memory comes straight from cudaMalloc: what torch's allocator hands out may be
    expandable segments, which register well and then move at a thousandth of the rate.

    Args:
        nbytes: At least this many; rounded up to whole pages.
        device: ``cpu`` or a CUDA device.
        pinned: Of the host's memory: locked, so that a GPU copies from and to it by itself.

    Raises:
        RegistrationError: The device has not that much memory left.
    """

    def __init__(self, nbytes: int, device: torch.device, *, pinned: bool = False) -> None:
        self.nbytes = max(math.ceil(nbytes / ALIGN_NBYTES), 1) * ALIGN_NBYTES
        self.device = device
        self._cuda_addr = 0
        if device.type == "cuda":
            self.data = self._cuda_malloc()
        else:
            raw = torch.empty(self.nbytes + ALIGN_NBYTES, dtype=torch.uint8, pin_memory=pinned)
            start = -raw.data_ptr() % ALIGN_NBYTES
            self.data = raw[start : start + self.nbytes]

    @property
    def memory(self) -> LocalMemory:
        """The slab as a transport registers it."""
        if self.device.type == "cuda":
            return LocalMemory(self.data.data_ptr(), self.nbytes, "VRAM", self.device.index or 0)
        return LocalMemory(self.data.data_ptr(), self.nbytes)

    def close(self) -> None:
        """Free it; every view of ``data`` is dead from now on.  Safe to call twice."""
        self.data = torch.empty(0, dtype=torch.uint8)
        if self._cuda_addr:
            addr, self._cuda_addr = self._cuda_addr, 0
            with torch.cuda.device(self.device):
                torch.cuda.synchronize()
                _cudart().cudaFree(ctypes.c_void_p(addr))

    def _cuda_malloc(self) -> torch.Tensor:
        addr = ctypes.c_void_p()
        with torch.cuda.device(self.device):
            torch.cuda.current_stream()  # makes the context that the allocation belongs to
            code = _cudart().cudaMalloc(ctypes.byref(addr), ctypes.c_size_t(self.nbytes))
            if code:
                _cudart().cudaGetLastError()  # or torch takes it for its own next call's
        if code or not addr.value:
            raise RegistrationError(
                f"cudaMalloc of {self.nbytes} bytes on {self.device} failed (code {code})",
                hint="leave that much GPU memory free, for example with torch.cuda.empty_cache()",
                nbytes=self.nbytes,
            )
        self._cuda_addr = addr.value
        return torch.as_tensor(_CudaBytes(addr.value, self.nbytes), device=self.device)


class _CudaBytes:
    """Foreign GPU memory, as torch takes it in without a copy."""

    def __init__(self, addr: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,), "typestr": "|u1", "data": (addr, False), "version": 3,
        }  # fmt: skip


def _cudart() -> ctypes.CDLL:
    # torch has loaded it: the soname finds that very copy
    return ctypes.CDLL(f"libcudart.so.{(torch.version.cuda or '13').split('.')[0]}")
