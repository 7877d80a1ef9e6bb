"""A trainer's own memory as what is written from: weights that need no copy into slots.

Only tensors that a source holds are lent, never what one makes when it is asked.  They stay
mapped while they are registered, since the loan keeps their storage (WS-9); whether a trainer has
put its weights elsewhere is looked at before every push (:meth:`Loan.moved`).
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from weightsync.layout import MemoryKind
from weightsync.lending import Lendable, Place
from weightsync.manifest import Manifest
from weightsync.plan import TransportPlan
from weightsync.transport.base import LocalMemory
from weightsync_client.converted import ConvertedSource
from weightsync_client.quantized import QuantizedSource
from weightsync_client.source import StateDictSource, WeightSource, dtype_name
from weightsync_client.structure import PreparedSource

#: a box: its tensor's name and its place among that tensor's boxes
Key = tuple[str, int]

_IS_LEGACY_CUDA_IPC_CAPABLE = 10  # CUpointer_attribute


@dataclass(frozen=True, slots=True)
class Lending:
    """What a rank may write from where it is.

    Attributes:
        least_nbytes: Bytes that must lie side by side here and at the destination; 0: nothing is
            lent.
        without: Names of tensors that are not lent: their memory changed before.
    """

    least_nbytes: int
    without: frozenset[str] = frozenset()


LEND_NOTHING = Lending(0)


class Loan:
    """What a source could lend, and, once a plan has chosen, what it does lend for an epoch.

    Args:
        source: Where the published values come from; None: nothing is lent.
        manifest: What is made of them: values of another dtype are to be computed, not lent.
        device: Where the slots would be.
        without: Names of tensors that are not to be lent.
    """

    def __init__(
        self,
        source: WeightSource | None,
        manifest: Manifest,
        device: torch.device,
        *,
        without: Collection[str] = (),
    ) -> None:
        self._device = device
        self._blocks: list[torch.UntypedStorage] = []
        self._index: dict[int, int] = {}
        self._seen: dict[Key, tuple[object, ...]] = {}
        self._origins: list[int] = []
        #: of a source whose tensors are where they were
        self._mark: tuple[object, ...] | None = None
        self._bytes: dict[int, torch.Tensor] = {}
        self.memory: list[LocalMemory] = []
        places: dict[Key, Place] = {}
        for key, values in _held(source):
            spec = manifest.by_name.get(key[0])
            if spec is None or key[0] in without or spec.dtype != dtype_name(values.dtype):
                continue
            block = self._block_of(values)
            if block is not None:
                offset = values.data_ptr() - self._blocks[block].data_ptr()
                places[key] = Place(block, offset, spec.dtype)
                self._seen[key] = _form(values)
        shared = self._shared()
        self.lendable = Lendable(
            tuple(storage.nbytes() for storage in self._blocks),
            {key: place for key, place in places.items() if place.block not in shared},
        )

    def _block_of(self, values: torch.Tensor) -> int | None:
        if values.device != self._device or not values.numel() or not values.is_contiguous():
            return None
        storage = values.untyped_storage()
        at = storage.data_ptr()
        known = self._index.get(at)
        if known is None:
            if self._device.type == "cuda" and not _from_cuda_malloc(at):
                return None  # expandable segments register well, and move at a crawl
            known = self._index[at] = len(self._blocks)
            self._blocks.append(storage)
        elif self._blocks[known].nbytes() < storage.nbytes():
            return None  # the same memory, seen as two storages of different length
        return known

    def _shared(self) -> set[int]:
        """Blocks that are partly the same memory: it cannot be registered twice."""
        blocks = enumerate(self._blocks)
        spans = sorted((s.data_ptr(), s.data_ptr() + s.nbytes(), k) for k, s in blocks)
        return {k for a, b in pairwise(spans) if b[0] < a[1] for k in (a[2], b[2])}

    def take(self, plan: TransportPlan) -> None:
        """Keep what the plan lends; let go of all other memory."""
        self._origins = list(plan.origins)
        self._seen = {key: self._seen[key] for key in plan.lent}
        used: dict[int, tuple[int, int]] = {}
        for write in (w for writes in plan.writes for w in writes):
            if (k := self._block_at(write.slot_offset)) < 0:
                continue
            start = write.slot_offset - self._origins[k]
            lo, hi = used.get(k, (start, start))
            used[k] = min(lo, start), max(hi, start + write.nbytes)
        kind: MemoryKind = "VRAM" if self._device.type == "cuda" else "DRAM"
        device_id = (self._device.index or 0) if kind == "VRAM" else 0
        self.memory = [
            LocalMemory(self._blocks[k].data_ptr() + lo, hi - lo, kind, device_id)
            for k, (lo, hi) in used.items()
        ]
        none = torch.empty(0, dtype=torch.uint8, device=self._device)
        self._bytes = {k: torch.empty_like(none).set_(self._blocks[k]) for k in used}
        self._blocks.clear()
        self._index.clear()

    def _block_at(self, slot_offset: int) -> int:
        return bisect_right(self._origins, slot_offset) - 1

    def piece(self, slot_offset: int, nbytes: int) -> torch.Tensor | None:
        """The bytes at an offset of the plan; None where that is in the slots."""
        k = self._block_at(slot_offset)
        if k < 0:
            return None
        start = slot_offset - self._origins[k]
        return self._bytes[k][start : start + nbytes]

    @property
    def lent(self) -> Collection[Key]:
        """The boxes that are written, in part at least, from where they are."""
        return self._seen.keys()

    def moved(self, source: WeightSource) -> set[str]:
        """Names of lent tensors whose values are elsewhere now, or are seen otherwise."""
        # what is lent is not quantised
        given = source.given if isinstance(source, QuantizedSource) else source
        mark = given.mark if isinstance(given, PreparedSource) else None
        if not self._seen or (mark is not None and mark == self._mark):
            return set()
        moved = {
            name
            for (name, box), form in self._seen.items()
            if _form(source.local(name, box)) != form
        }
        self._mark = None if moved else mark
        return moved

    def close(self) -> None:
        """Let go of the memory.  No write may be in flight."""
        self._bytes.clear()
        self._blocks.clear()
        self.memory.clear()


def _held(source: WeightSource | None) -> Iterator[tuple[Key, torch.Tensor]]:
    """Every box of a source that keeps its tensors, all at the same time."""
    made: Collection[str] = ()
    if isinstance(source, QuantizedSource):
        made, source = source.chosen, source.given
    if isinstance(source, StateDictSource | ConvertedSource):
        for name, boxes in source.holdings().items():
            for box in range(len(boxes)) if name not in made else ():
                yield (name, box), source.local(name, box)


def _form(values: torch.Tensor) -> tuple[object, ...]:
    """Equal for the same values at the same place."""
    return values.data_ptr(), values.dtype, values.shape, values.stride(), values.device


def _from_cuda_malloc(addr: int) -> bool:
    capable = ctypes.c_int(0)
    code = ctypes.CDLL("libcuda.so.1").cuPointerGetAttribute(
        ctypes.byref(capable), _IS_LEGACY_CUDA_IPC_CAPABLE, ctypes.c_uint64(addr)
    )
    return code == 0 and bool(capable.value)
