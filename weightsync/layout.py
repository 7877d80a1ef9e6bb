"""Where a worker wants the bytes: kernel regions and the copies that its loader makes into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["direct", "shadow", "staged", "refused"]
MemoryKind = Literal["DRAM", "VRAM"]


@dataclass(frozen=True, slots=True, order=True)
class WorkerPlace:
    """The logical place of a worker in its engine; never a device number.

    ``engine`` tells apart the engines behind one agent.
    """

    engine: int = 0
    dp: int = 0
    pp: int = 0
    tp: int = 0
    ep: int = 0

    def __str__(self) -> str:
        return f"engine{self.engine}/dp{self.dp}/pp{self.pp}/tp{self.tp}/ep{self.ep}"


@dataclass(frozen=True, slots=True)
class CopyRecord:
    """One strided copy that the engine's loader makes.  All numbers are elements, not bytes.

    The checkpoint tensor ``tensor`` is seen as contiguous.  Element ``(i0, i1, ...)`` below
    ``shape`` goes from ``src_offset + sum(i*s for src_strides)`` of that tensor to
    ``dst_offset + sum(i*s for dst_strides)`` of kernel region ``region``, cast to the region's
    dtype.  A source stride of 0 is a broadcast.
    """

    tensor: str
    shape: tuple[int, ...]
    src_offset: int
    src_strides: tuple[int, ...]
    region: int
    dst_offset: int
    dst_strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class KernelRegion:
    """Registered memory of a worker that the trainer writes one kernel tensor into.

    Attributes:
        name: Name of the kernel tensor (the engine's parameter name).
        dtype: Element type in this memory.
        shape: Shape in load format.
        nbytes: Length of the region.
        mode: ``direct``: the region is the live tensor's storage; ``shadow``: it is a copy of it
            that takes its place at commit; ``staged``: it is a buffer in load format that the
            engine's own post-processing turns into the kernel tensor.
        addr: Start address in the worker's address space.
        kind: Memory kind at the worker.
        device_id: Device of the memory as the worker counts (0 for DRAM).
        untouched: Byte intervals ``(start, stop)`` that the loader leaves alone or fills with a
            constant (padding); sorted, disjoint.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    mode: Mode
    addr: int
    kind: MemoryKind = "DRAM"
    device_id: int = 0
    untouched: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Scratch:
    """Registered memory of a worker that nothing reads: a probe may write there at any time (WS-1).

    Attributes:
        addr: Start address in the worker's address space.
        nbytes: Length.
        kind: As that of the regions.
        device_id: Device of the memory as the worker counts (0 for DRAM).
    """

    addr: int
    nbytes: int
    kind: MemoryKind = "DRAM"
    device_id: int = 0


@dataclass(frozen=True, slots=True)
class WorkerLayout:
    """Everything that a trainer must know to write to one worker.

    ``skipped`` are the manifest's tensors that the engine's loader takes and drops; ``scratch`` is
    where a probe goes.
    """

    place: WorkerPlace
    regions: tuple[KernelRegion, ...]
    records: tuple[CopyRecord, ...]
    skipped: tuple[str, ...] = ()
    scratch: Scratch | None = None
