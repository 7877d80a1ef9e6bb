"""Who writes which bytes of which target: all ranks for the proof, or one rank for its plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from weightsync.coverage import AddressSpace
from weightsync.geometry import Int64s, StridedCopy, clip, dst_runs
from weightsync.ownership import Cells
from weightsync.slots import Piece
from weightsync.targets import Form, Target


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank makes of a form from one of its boxes, to destination 0.

    ``runs`` are the first elements that it writes (an int where there is one run), ``length``
    elements each.
    """

    rank: int
    box: int
    copy: StridedCopy
    runs: Int64s | int
    length: int


class Cutter:
    """Cuts forms along who holds what.  Tensors that are held alike are cut once.

    Args:
        cells: The cells of every tensor that is copied; they outlive the cutter.
        rank: Whose parts to find; ``None``: everyone's.
    """

    def __init__(self, cells: dict[str, Cells], rank: int | None = None) -> None:
        self._cells = cells
        self._rank = rank
        # Cells and forms are told apart by identity: both live as long as the plan is made.
        self._known: dict[tuple[int, int], list[Part]] = {}

    def parts(self, tensor: str, form: Form) -> list[Part]:
        """The parts of a form that reads ``tensor``."""
        cells = self._cells[tensor]
        key = (id(cells), id(form))
        parts = self._known.get(key)
        if parts is None:
            parts = self._known[key] = self._cut(cells, form)
        return parts

    def _cut(self, cells: Cells, form: Form) -> list[Part]:
        parts: list[Part] = []
        if form.copy is None:
            return parts
        for cell in cells.near(form.copy):
            if self._rank is not None and cell.rank != self._rank:
                continue
            if cell.window.shape == cells.shape == cell.storage.shape:
                found: Sequence[StridedCopy] = [form.copy]
            else:
                found = list(clip(form.copy, cells.shape, cell.window, cell.storage))
            parts += [Part(cell.rank, cell.box, copy, *dst_runs(copy)) for copy in found]
        return parts


@dataclass(frozen=True, slots=True)
class Runs:
    """Contiguous bytes ``[starts, stops)`` in the address space of all targets, and who writes."""

    starts: Int64s
    stops: Int64s
    ranks: Int64s

    def of(self, rank: int) -> tuple[Int64s, Int64s]:
        """Starts and stops of one rank's."""
        mine = self.ranks == rank
        return self.starts[mine], self.stops[mine]


def address_space(targets: Sequence[Target]) -> AddressSpace:
    """All targets, one behind another."""
    return AddressSpace([target.region.nbytes for target in targets])


def all_runs(targets: Sequence[Target], space: AddressSpace, cells: dict[str, Cells]) -> Runs:
    """Every byte that any rank writes."""
    cutter = Cutter(cells)
    # Single runs are collected as numbers; tables of runs, and of many ranks, as arrays.
    starts: list[int] = []
    stops: list[int] = []
    ranks: list[int] = []
    tables: list[tuple[Int64s, Int64s, Int64s]] = []
    known: dict[int, tuple[Int64s, Int64s, Int64s]] = {}
    for target, base in zip(targets, space.bases.tolist(), strict=False):
        size = target.itemsize
        for record, form in zip(target.records, target.forms, strict=True):
            parts = cutter.parts(record.tensor, form)
            if not parts:
                continue
            origin = base + record.dst_offset * size
            if len(parts) == 1 and isinstance(parts[0].runs, int):
                part = parts[0]
                starts.append(origin + parts[0].runs * size)
                stops.append(starts[-1] + part.length * size)
                ranks.append(part.rank)
                continue
            table = known.get(id(parts))
            if table is None:
                table = known[id(parts)] = _table(parts)
            first = origin + table[0] * size
            tables.append((first, first + table[1] * size, table[2]))
    return Runs(
        np.concatenate((np.array(starts, dtype=np.int64), *(t[0] for t in tables))),
        np.concatenate((np.array(stops, dtype=np.int64), *(t[1] for t in tables))),
        np.concatenate((np.array(ranks, dtype=np.int64), *(t[2] for t in tables))),
    )


def _table(parts: Sequence[Part]) -> tuple[Int64s, Int64s, Int64s]:
    """First elements, lengths and ranks of all runs of some parts."""
    runs = [np.atleast_1d(np.asarray(part.runs, dtype=np.int64)) for part in parts]
    counts = [len(r) for r in runs]
    return (
        np.concatenate(runs),
        np.repeat(np.array([part.length for part in parts], dtype=np.int64), counts),
        np.repeat(np.array([part.rank for part in parts], dtype=np.int64), counts),
    )


def pieces_of(
    rank: int, targets: Sequence[Target], space: AddressSpace, cells: dict[str, Cells]
) -> tuple[list[Piece], Int64s, Int64s, Int64s]:
    """What one rank writes: its pieces, the starts and stops of their runs, how many each has."""
    cutter = Cutter(cells, rank)
    distinct = {id(held): held for held in cells.values()}
    held_here = {
        key for key, held in distinct.items() if any(cell.rank == rank for cell in held.cells)
    }
    mine = {tensor for tensor, held in cells.items() if id(held) in held_here}
    pieces: list[Piece] = []
    starts: list[Int64s] = []
    lengths: list[Int64s] = []
    for target, base in zip(targets, space.bases.tolist(), strict=False):
        size, dtype = target.itemsize, target.region.dtype
        for record, form in zip(target.records, target.forms, strict=True):
            if record.tensor not in mine:
                continue
            for part in cutter.parts(record.tensor, form):
                copy = part.copy._replace(dst_offset=part.copy.dst_offset + record.dst_offset)
                pieces.append(Piece(record.tensor, part.box, copy, dtype, size, base))
                runs = np.atleast_1d(np.asarray(part.runs, dtype=np.int64))
                starts.append(base + (record.dst_offset + runs) * size)
                lengths.append(np.full(len(runs), part.length * size, dtype=np.int64))
    empty = np.zeros(0, dtype=np.int64)
    begin = np.concatenate((empty, *starts))
    counts = np.array([len(runs) for runs in starts], dtype=np.int64)
    return pieces, begin, begin + np.concatenate((empty, *lengths)), counts
