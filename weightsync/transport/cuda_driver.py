"""What torch lacks of the CUDA driver: memory of other processes, and copies by batches."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from weightsync.errors import TransportError
from weightsync.transport.base import LocalMemory

logger = logging.getLogger(__name__)

#: of the driver, in thousands: batches of copies
_LEAST_DRIVER = 12080


@dataclass(frozen=True, slots=True)
class Allocation:
    """What one cudaMalloc returned, and its handle for other processes."""

    base: int
    nbytes: int
    handle: bytes


@dataclass(frozen=True, slots=True)
class Batch:
    """Copies: destinations as this process sees them, sources, bytes."""

    to: list[Any]
    of: list[Any]
    sizes: list[int]

    @classmethod
    def of_addresses(cls, to: list[int], of: list[int], sizes: list[int]) -> Batch:
        """The same from plain addresses."""
        from cuda.bindings import driver

        pointer = driver.CUdeviceptr
        return cls([pointer(addr) for addr in to], [pointer(addr) for addr in of], sizes)

    @property
    def nbytes(self) -> int:
        """All of them."""
        return sum(self.sizes)

    def queue(self, stream: torch.cuda.Stream) -> None:
        """Queue the copies; their order among each other is open.

        Raises:
            TransportError: The driver refuses.
        """
        if not self.sizes:
            return
        from cuda.bindings import driver

        plain = driver.CUmemcpyAttributes()
        plain.srcAccessOrder = driver.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        with torch.cuda.device(stream.device):
            call(
                "cuMemcpyBatchAsync",
                *(self.to, self.of, self.sizes, len(self.sizes)),
                *([plain], [0], 1, stream.cuda_stream),
            )


def check_version() -> None:
    """Refuse a driver without batches.

    Raises:
        TransportError: It has none, or there is no driver.
    """
    (version,) = call("cuDriverGetVersion")
    if version < _LEAST_DRIVER:
        raise TransportError(f"the CUDA driver is of version {version}, no {_LEAST_DRIVER}")


def export(memory: Sequence[LocalMemory]) -> tuple[Allocation, ...]:
    """The allocations that hold this memory, in order, as far as CUDA gives handles for them."""
    found: dict[int, Allocation] = {}
    stop = 0
    for one in sorted(memory, key=lambda m: m.addr):
        if one.addr < stop:
            continue
        try:
            with torch.cuda.device(one.device_id):
                base, nbytes = (int(v) for v in call("cuMemGetAddressRange", one.addr))
                (handle,) = call("cuIpcGetMemHandle", base)
        except TransportError as error:
            logger.info("memory at %#x cannot be mapped by others: %s", one.addr, error)
            continue
        stop = base + nbytes
        found[base] = Allocation(base, nbytes, bytes(handle.reserved))
    return tuple(found.values())


def map_here(allocation: Allocation) -> int:
    """Where another process's allocation is mapped, for the current device.

    Raises:
        TransportError: It cannot be.
    """
    from cuda.bindings import driver

    opaque = driver.CUipcMemHandle()
    opaque.reserved = allocation.handle
    flag = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
    (addr,) = call("cuIpcOpenMemHandle", opaque, flag.value)
    return int(addr)


def call(name: str, *args: object) -> tuple[Any, ...]:
    """What a call of the CUDA driver returns.

    Raises:
        TransportError: Whatever it says, or there is no binding (it comes with torch for CUDA).
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise TransportError(f"no binding of the CUDA driver: {error}") from error
    code, *values = getattr(driver, name)(*args)
    if code != driver.CUresult.CUDA_SUCCESS:
        raise TransportError(f"{name} failed: {code.name}")
    return tuple(values)
