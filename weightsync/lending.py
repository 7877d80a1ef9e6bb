"""Writes straight from a trainer's own memory: what lies there as the wire wants it needs no slot.

Pure integers, as all planning.  A rank tells where the values of its boxes lie (:class:`Lendable`);
the plan takes those runs that are large enough, or become so beside their neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from weightsync.geometry import Int64s, grid
from weightsync.slots import SLOT_ALIGN_NBYTES, Piece

#: a descriptor more must not cost more than the copy that it saves
LEND_NBYTES = 1 << 20
#: runs shorter than this part of it are not even looked at: there could be millions
_RUN_PART = 64


class Place(NamedTuple):
    """Where a box's values lie, contiguous, in its shape: at byte ``offset`` of a block."""

    block: int
    offset: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Lendable:
    """A rank's memory that can be written from.

    Attributes:
        blocks: Bytes of each block, memory that may be registered as one.
        places: By tensor and box.
    """

    blocks: tuple[int, ...] = ()
    places: Mapping[tuple[str, int], Place] = field(default_factory=dict)

    def origins(self, slot_nbytes: int) -> Int64s:
        """Where each block begins when all lie behind ``slot_nbytes`` of slots."""
        sizes = np.array([slot_nbytes, *self.blocks], dtype=np.int64)
        ends: Int64s = np.cumsum(-(-sizes // SLOT_ALIGN_NBYTES) * SLOT_ALIGN_NBYTES)
        return ends


@dataclass(frozen=True, slots=True)
class Lent:
    """Runs that are written from where they are.

    Attributes:
        starts: Addresses in the plan, sorted.
        stops: Their ends.
        blocks: The block of each.
        offsets: Bytes into it.
        boxes: The boxes that they are of.
    """

    starts: Int64s
    stops: Int64s
    blocks: Int64s
    offsets: Int64s
    boxes: tuple[tuple[str, int], ...]


def lend(
    pieces: Sequence[Piece], lendable: Lendable, least_nbytes: int
) -> tuple[Lent, npt.NDArray[np.bool_]]:
    """Choose what is written without a copy.

    A piece is lent whole or not at all: every run of it must be part of at least ``least_nbytes``
    that lie side by side here and at the destination.

    Returns:
        What is lent, neighbours merged, and which pieces that are.
    """
    taken: list[int] = []
    tables: list[tuple[Int64s, Int64s, int, int]] = []
    for index, piece in enumerate(pieces):
        place = lendable.places.get((piece.tensor, piece.box))
        if place is None or place.dtype != piece.dtype:
            continue
        dims = piece.copy.dims
        length, outer = (dims[-1][0], dims[:-1]) if dims and dims[-1][1:] == (1, 1) else (1, dims)
        nbytes = length * piece.itemsize
        if nbytes * _RUN_PART < least_nbytes:
            continue
        src = grid(piece.copy.src_offset, [(n, s) for n, s, _ in outer]).ravel() * piece.itemsize
        dst = grid(piece.copy.dst_offset, [(n, d) for n, _, d in outer]).ravel() * piece.itemsize
        taken.append(index)
        tables.append((dst + piece.base, src + place.offset, nbytes, place.block))
    starts = _concatenate([t[0] for t in tables])
    counts = [len(t[0]) for t in tables]
    runs = _Runs(
        starts,
        starts + np.repeat(np.array([t[2] for t in tables], dtype=np.int64), counts),
        np.repeat(np.array([t[3] for t in tables], dtype=np.int64), counts),
        _concatenate([t[1] for t in tables]),
    )
    owners = np.repeat(np.arange(len(tables)), counts)
    large = np.ones(len(tables), dtype=bool)
    np.logical_and.at(large, owners, runs.group_nbytes() >= least_nbytes)
    mask = np.zeros(len(pieces), dtype=bool)
    mask[np.array(taken, dtype=np.int64)[large]] = True
    boxes = dict.fromkeys((pieces[k].tensor, pieces[k].box) for k in np.flatnonzero(mask).tolist())
    merged = runs.only(large[owners]).merged()
    return Lent(merged.starts, merged.stops, merged.blocks, merged.offsets, tuple(boxes)), mask


class _Runs(NamedTuple):
    starts: Int64s
    stops: Int64s
    blocks: Int64s
    offsets: Int64s

    def only(self, mask: npt.NDArray[np.bool_]) -> _Runs:
        return _Runs(*(column[mask] for column in self))

    def _first(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """The order of the destination, and in it which runs continue no other one."""
        order = np.argsort(self.starts, kind="stable")
        starts, stops, blocks, offsets = (column[order] for column in self)
        first = np.ones(len(order), dtype=bool)
        first[1:] = (
            (starts[1:] != stops[:-1])
            | (blocks[1:] != blocks[:-1])
            | (offsets[1:] - starts[1:] != offsets[:-1] - starts[:-1])
        )
        return order, first

    def group_nbytes(self) -> Int64s:
        """For each run the bytes of all that it lies side by side with."""
        order, first = self._first()
        group = np.cumsum(first) - 1
        sums: Int64s = np.zeros(int(first.sum()), dtype=np.int64)
        np.add.at(sums, group, (self.stops - self.starts)[order])
        nbytes: Int64s = np.zeros(len(order), dtype=np.int64)
        nbytes[order] = sums[group]
        return nbytes

    def merged(self) -> _Runs:
        order, first = self._first()
        last = np.ones(len(order), dtype=bool)
        last[:-1] = first[1:]
        return _Runs(
            self.starts[order][first],
            self.stops[order][last],
            self.blocks[order][first],
            self.offsets[order][first],
        )


def _concatenate(tables: Sequence[Int64s]) -> Int64s:
    return np.concatenate((np.zeros(0, dtype=np.int64), *tables))
