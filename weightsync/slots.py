"""A rank's slot memory: what it will write, packed in destination order, and how to fill it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from weightsync.errors import PlanError
from weightsync.geometry import Int64s, StridedCopy, affine_blocks, clip_dst, grid, union

#: every piece of a slot begins at a multiple of this many bytes
SLOT_ALIGN_NBYTES = 64
#: a push in more rounds than this spends its time between them
MAX_ROUNDS = 1024


@dataclass(frozen=True, slots=True)
class Fill:
    """One strided copy, with cast, from a shard of this rank into its slot memory.

    With ``local`` the contiguous shard ``box`` (index into the rank's boxes of ``tensor``)::

        slot.view(dtype).as_strided(shape, slot_strides, slot_offset // itemsize(dtype)).copy_(
            local.as_strided(shape, src_strides, src_offset))

    Attributes:
        tensor: Name of the checkpoint tensor.
        box: Which of the rank's boxes of it.
        shape: Shape of the copy.
        src_offset: Elements into the shard's storage.
        src_strides: Elements; 0 is a broadcast.
        dtype: Element type in the slot: the kernel region's.
        slot_offset: Bytes into the slot memory, a multiple of the item size.
        slot_strides: Elements of ``dtype``.
    """

    tensor: str
    box: int
    shape: tuple[int, ...]
    src_offset: int
    src_strides: tuple[int, ...]
    dtype: str
    slot_offset: int
    slot_strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Write:
    """``nbytes`` from byte ``slot_offset`` of the slot memory to byte ``offset`` of a region."""

    slot_offset: int
    nbytes: int
    region: int
    offset: int


@dataclass(frozen=True, slots=True)
class Round:
    """What is in the slot memory at one time.

    Attributes:
        fills: What makes these slots; together they write every byte that ``writes`` reads.
        writes: For every worker (in the order of the layouts) what goes there; workers that want
            the same bytes read the same slot.
    """

    fills: tuple[Fill, ...]
    writes: tuple[tuple[Write, ...], ...]


class Piece(NamedTuple):
    """Part of the copies into a kernel tensor that one rank makes from one of its boxes.

    ``base`` is the kernel tensor's address in the plan, a multiple of every item size.
    """

    tensor: str
    box: int
    copy: StridedCopy
    dtype: str
    itemsize: int
    base: int


@dataclass(frozen=True, slots=True)
class Slots:
    """The merged intervals of plan addresses that a rank writes, and their slot offsets."""

    starts: Int64s
    stops: Int64s
    offsets: Int64s
    nbytes: int

    @classmethod
    def lay_out(cls, starts: Int64s, stops: Int64s) -> Slots:
        """Merge the intervals and lay them one behind another."""
        starts, stops = union(starts, stops)
        aligned = -(-(stops - starts) // SLOT_ALIGN_NBYTES) * SLOT_ALIGN_NBYTES
        ends = np.cumsum(aligned)
        return cls(starts, stops, ends - aligned, int(ends[-1]) if len(ends) else 0)

    @property
    def filled_nbytes(self) -> int:
        """Bytes of all intervals, without the padding between them."""
        return int((self.stops - self.starts).sum())

    def rounds(self, round_nbytes: int) -> list[Slots]:
        """The slots in rounds of ``round_nbytes`` (a multiple of the alignment) at most.

        Rounds follow the addresses, and take turns in two halves of the memory: one is filled
        while the other is on the wire.
        """
        if self.nbytes <= round_nbytes:
            return [self]
        found: list[Slots] = []
        for k, lo in enumerate(range(0, self.nbytes, round_nbytes)):
            # Slots begin at multiples of the alignment, which every item size divides: so do cuts.
            hi = lo + round_nbytes
            first = int(np.searchsorted(self.offsets, lo, side="right")) - 1
            part = slice(first, int(np.searchsorted(self.offsets, hi, side="left")))
            offsets: Int64s = np.maximum(self.offsets[part], lo)
            starts: Int64s = self.starts[part] + (offsets - self.offsets[part])
            stops: Int64s = np.minimum(
                self.stops[part], self.starts[part] + (hi - self.offsets[part])
            )
            offsets = offsets - lo + k % 2 * round_nbytes
            found.append(Slots(starts, stops, offsets, round_nbytes))
        return found

    def place(
        self, addresses: Int64s, nbytes: int | Int64s
    ) -> tuple[Int64s, npt.NDArray[np.bool_]]:
        """Slot offsets of addresses, and whether ``nbytes`` from there stay in one interval."""
        k = np.searchsorted(self.starts, addresses, side="right") - 1
        offsets: Int64s = addresses - self.starts[k] + self.offsets[k]
        return offsets, np.asarray(addresses + nbytes <= self.stops[k])


def round_nbytes(nbytes: int, max_nbytes: int | None) -> int:
    """Bytes of the rounds in which ``nbytes`` of slots go through a bounded memory.

    Returns:
        ``nbytes`` where all fits at once; else a multiple of the alignment, not more than half of
        ``max_nbytes``, such that the rounds are as few as can be and alike.

    Raises:
        PlanError: The bound is too small.
    """
    if max_nbytes is None or nbytes <= max_nbytes:
        return nbytes
    half = max_nbytes // 2 // SLOT_ALIGN_NBYTES * SLOT_ALIGN_NBYTES
    if half * MAX_ROUNDS < nbytes:
        least = 2 * _aligned(-(-nbytes // MAX_ROUNDS))
        raise PlanError(
            f"{nbytes} bytes of slots do not go through {max_nbytes} bytes of slot memory in "
            f"{MAX_ROUNDS} rounds",
            hint=f"raise max_slot_bytes to {least} or more",
            least=least,
        )
    return _aligned(-(-nbytes // -(-nbytes // half)))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // SLOT_ALIGN_NBYTES) * SLOT_ALIGN_NBYTES


class Pieces:
    """All pieces of a rank, found by address."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces
        firsts = [p.base + p.copy.dst_offset * p.itemsize for p in pieces]
        spans = [(p.copy.dst_span + 1) * p.itemsize for p in pieces]
        self._firsts: Int64s = np.array(firsts, dtype=np.int64)
        self._stops: Int64s = self._firsts + np.array(spans, dtype=np.int64)

    def between(self, lo: int, hi: int) -> list[Piece]:
        """What the pieces write to plan addresses ``[lo, hi)``, which cut no element."""
        found: list[Piece] = []
        near = np.flatnonzero((self._firsts < hi) & (self._stops > lo))
        inside = (self._firsts[near] >= lo) & (self._stops[near] <= hi)
        for index, whole in zip(near.tolist(), inside.tolist(), strict=True):
            piece = self._pieces[index]
            if whole:
                found.append(piece)
                continue
            first, stop = ((at - piece.base) // piece.itemsize for at in (lo, hi))
            found += [piece._replace(copy=copy) for copy in clip_dst(piece.copy, first, stop)]
        return found


def fills(pieces: Sequence[Piece], slots: Slots) -> Iterator[Fill]:
    """The fills that make these pieces: one each, unless its slot addresses are irregular."""
    if not pieces:
        return
    first = [p.base + p.copy.dst_offset * p.itemsize for p in pieces]
    spans = [(p.copy.dst_span + 1) * p.itemsize for p in pieces]
    offsets, inside = slots.place(np.array(first, dtype=np.int64), np.array(spans, dtype=np.int64))
    for piece, address, offset, whole in zip(
        pieces, first, offsets.tolist(), inside.tolist(), strict=True
    ):
        tensor, box, (src, _, dims), dtype, _, _ = piece
        if not whole:
            yield from _spread(piece, address, slots)
            continue
        shape, src_strides, dst_strides = zip(*dims, strict=True) if dims else ((), (), ())
        yield Fill(tensor, box, shape, src, src_strides, dtype, offset, dst_strides)


def _spread(piece: Piece, address: int, slots: Slots) -> Iterator[Fill]:
    """The fills of a piece whose destination lies in several intervals."""
    tensor, box, (src, _, dims), dtype, size, _ = piece
    shape, src_strides, dst_strides = zip(*dims, strict=True)
    for k in range(1, len(dims) + 1):
        # Do the dims from k on stay in one interval, wherever the dims before it are?
        span = (sum((n - 1) * d for n, _, d in dims[k:]) + 1) * size
        table, whole = slots.place(grid(address, [(n, d * size) for n, _, d in dims[:k]]), span)
        if whole.all():
            break
    for index, block, steps in affine_blocks(table):
        yield Fill(
            tensor,
            box,
            block + shape[k:],
            src + sum(i * s for i, s in zip(index, src_strides, strict=False)),
            src_strides,
            dtype,
            int(table[index]),
            tuple(step // size for step in steps) + dst_strides[k:],
        )
