"""From what ranks hold and what workers want to slots and writes.

Every rank plans by itself, from the same manifest, layouts and holdings, and gets its own part of
one plan; the proof is about the parts of all ranks together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from weightsync.coverage import (
    AddressSpace,
    Fault,
    check_names,
    check_record,
    check_untouched,
    nearest,
)
from weightsync.dtypes import itemsize
from weightsync.errors import ManifestError, PlanError
from weightsync.geometry import Int64s, StridedCopy, clip, dst_runs, strided_copy
from weightsync.layout import CopyRecord, KernelRegion, WorkerLayout
from weightsync.manifest import Manifest
from weightsync.ownership import Cells, Holdings, assign
from weightsync.slots import Fill, Piece, Slots, Write, fills

__all__ = ["Fill", "Holdings", "TransportPlan", "Write", "build_plan", "build_plans"]

#: replicated tensors are shared out in parts of at least this: small enough to balance, large
#: enough that a part's descriptor costs nothing beside its bytes
SPLIT_NBYTES = 16 << 20


@dataclass(frozen=True)
class TransportPlan:
    """One rank's slots and writes for one epoch.

    Attributes:
        rank: The writing rank.
        slot_nbytes: Bytes of slot memory that it needs.
        fills: What makes the slots; together they write every byte that ``writes`` reads.
        writes: For every worker (in the order of the layouts) what goes there; workers that want
            the same bytes read the same slot.
    """

    rank: int
    slot_nbytes: int
    fills: tuple[Fill, ...]
    writes: tuple[tuple[Write, ...], ...]

    @cached_property
    def nbytes(self) -> int:
        """Bytes that this rank writes in one push, to all workers."""
        return sum(write.nbytes for writes in self.writes for write in writes)

    def declared(self, worker: int) -> list[tuple[int, int, int]]:
        """The writes to a worker as it is told of them: (region, offset, nbytes)."""
        return [(write.region, write.offset, write.nbytes) for write in self.writes[worker]]


def build_plan(
    manifest: Manifest,
    layouts: Sequence[WorkerLayout],
    holdings: Holdings | None = None,
    *,
    rank: int = 0,
    allow_skipped: Sequence[str] = (),
    split_nbytes: int = SPLIT_NBYTES,
) -> TransportPlan:
    """Plan one rank's part, and prove the whole.

    All ranks call this with equal arguments, but for ``rank``.

    Args:
        manifest: The checkpoint tensors that the ranks make together.
        layouts: All workers of all engines.
        holdings: What every rank holds; ``None``: one rank holds everything whole.
        rank: Whose plan to return.
        allow_skipped: Shell patterns of tensors that the engines may drop.
        split_nbytes: Tensors that several ranks hold are cut between them, not below this size.

    Raises:
        ManifestError: A tensor that no engine knows, or kernel bytes for which there is none.
        PlanError: Bytes that no rank holds, bytes written twice, or a broken layout.
    """
    return build_plans(
        manifest,
        layouts,
        holdings,
        ranks=[rank],
        allow_skipped=allow_skipped,
        split_nbytes=split_nbytes,
    )[0]


def build_plans(
    manifest: Manifest,
    layouts: Sequence[WorkerLayout],
    holdings: Holdings | None = None,
    *,
    ranks: Sequence[int] | None = None,
    allow_skipped: Sequence[str] = (),
    split_nbytes: int = SPLIT_NBYTES,
) -> list[TransportPlan]:
    """The plans of several ranks (default: all), as :func:`build_plan` makes each."""
    world_size = 1 if holdings is None else len(holdings)
    ranks = range(world_size) if ranks is None else ranks
    if not all(0 <= rank < world_size for rank in ranks):
        raise PlanError(
            f"no such rank among {list(ranks)}: {world_size} ranks declared what they hold",
            hint="every rank gathers the holdings of all ranks",
        )
    if not layouts:
        raise PlanError("no worker has a layout", hint="make a rendezvous with an agent first")
    targets, places = _targets(manifest, layouts)
    check_names(manifest, layouts, allow_skipped=allow_skipped)
    wire: dict[str, int] = {}
    for target in targets:
        for record, copy in target.copies:
            nbytes = copy.numel * target.itemsize * target.workers
            wire[record.tensor] = wire.get(record.tensor, 0) + nbytes
    cells = assign(manifest, holdings, wire, split_nbytes=split_nbytes)
    survey = _survey(targets, cells, frozenset(ranks))
    _prove(survey, targets, cells)
    return [_plan_of(rank, survey, targets, places) for rank in ranks]


@dataclass(slots=True)
class _Target:
    """Region content that one or more workers want alike; ``worker`` is the first of them."""

    layout: WorkerLayout
    region: KernelRegion
    itemsize: int
    copies: list[tuple[CopyRecord, StridedCopy]]
    workers: int = 1

    @property
    def name(self) -> str:
        return f"kernel tensor {self.region.name!r} of {self.layout.place}"


#: for every worker, the index of each region's target
_Places = list[list[int]]


def _targets(manifest: Manifest, layouts: Sequence[WorkerLayout]) -> tuple[list[_Target], _Places]:
    targets: list[_Target] = []
    seen: dict[object, int] = {}
    places: _Places = []
    for layout in layouts:
        records: list[list[CopyRecord]] = [[] for _ in layout.regions]
        for record in layout.records:
            if not 0 <= record.region < len(records):
                raise PlanError(
                    f"{layout.place}: a copy from {record.tensor!r} goes to region "
                    f"{record.region} of {len(records)}",
                    hint="the engine's layout is broken: trace it again",
                )
            records[record.region].append(record)
        here: list[int] = []
        for region, wanted in zip(layout.regions, records, strict=True):
            content = tuple(
                (r.tensor, r.shape, r.src_offset, r.src_strides, r.dst_offset, r.dst_strides)
                for r in wanted
            )
            key = (region.dtype, region.nbytes, region.untouched, content)
            known = seen.setdefault(key, len(targets))
            if known < len(targets):
                targets[known].workers += 1
            else:
                targets.append(_target(manifest, layout, region, wanted))
            here.append(known)
        places.append(here)
    return targets, places


def _target(
    manifest: Manifest, layout: WorkerLayout, region: KernelRegion, records: list[CopyRecord]
) -> _Target:
    size = itemsize(region.dtype)
    target = _Target(layout, region, size, [])
    check_untouched(region, target.name)
    for record in records:
        check_record(record, manifest, layout, size)
        copy = strided_copy(
            record.shape,
            record.src_offset,
            record.src_strides,
            record.dst_offset,
            record.dst_strides,
        )
        if copy is not None:
            target.copies.append((record, copy))
    return target


# ------------------------------------------------------------------ who writes what, and the proof


@dataclass(frozen=True, slots=True)
class _Survey:
    """All bytes that all ranks write, in one address space; pieces of the wanted ranks alone.

    ``runs[rank]`` are starts and stops.
    """

    space: AddressSpace
    pieces: dict[int, list[Piece]]
    runs: dict[int, tuple[Int64s, Int64s]]


def _survey(targets: Sequence[_Target], cells: dict[str, Cells], ranks: frozenset[int]) -> _Survey:
    space = AddressSpace([target.region.nbytes for target in targets])
    pieces: dict[int, list[Piece]] = {rank: [] for rank in ranks}
    singles: dict[int, tuple[list[int], list[int]]] = {}
    tables: dict[int, list[tuple[Int64s, Int64s]]] = {}
    for target, base in zip(targets, space.bases.tolist(), strict=False):
        size, dtype = target.itemsize, target.region.dtype
        for record, copy in target.copies:
            for rank, box, part in _parts(copy, cells[record.tensor]):
                runs, length = dst_runs(part)
                if isinstance(runs, int):
                    starts, stops = singles.setdefault(rank, ([], []))
                    starts.append(base + runs * size)
                    stops.append(base + (runs + length) * size)
                else:
                    table = base + runs * size
                    tables.setdefault(rank, []).append((table, table + length * size))
                if rank in pieces:
                    pieces[rank].append(Piece(record.tensor, box, part, dtype, size, base))
    joined: dict[int, tuple[Int64s, Int64s]] = {}
    for rank in sorted(pieces.keys() | singles.keys() | tables.keys()):
        starts, stops = singles.get(rank, ([], []))
        more = tables.get(rank, [])
        joined[rank] = (
            np.concatenate((np.array(starts, dtype=np.int64), *(first for first, _ in more))),
            np.concatenate((np.array(stops, dtype=np.int64), *(stop for _, stop in more))),
        )
    return _Survey(space, pieces, joined)


def _parts(copy: StridedCopy, cells: Cells) -> Iterator[tuple[int, int, StridedCopy]]:
    """Who makes which part of a copy: (rank, its box, the part)."""
    for cell in cells.near(copy):
        if cell.window.shape == cells.shape == cell.storage.shape:
            yield cell.rank, cell.box, copy
        else:
            for part in clip(copy, cells.shape, cell.window, cell.storage):
                yield cell.rank, cell.box, part


def _prove(survey: _Survey, targets: Sequence[_Target], cells: dict[str, Cells]) -> None:
    holes, twice = survey.space.faults(
        np.concatenate([starts for starts, _ in survey.runs.values()]),
        np.concatenate([stops for _, stops in survey.runs.values()]),
        [target.region.untouched for target in targets],
    )
    if twice:
        fault, target = twice[0], targets[twice[0].region]
        tensors = [record.tensor for record, _ in _writers(target, fault)]
        raise PlanError(
            f"{target.name}: {_span(fault, target)} would be written more than once, or are "
            f"declared untouched and written; copies there: {', '.join(tensors)}",
            hint="the engine's layout is broken: every byte has one source (WS-7)",
            region=target.region.name,
            tensors=tensors,
            faults=len(twice),
        )
    if holes:
        fault, target = holes[0], targets[holes[0].region]
        context = {"region": target.region.name, "bytes": [fault.start, fault.stop]}
        for record, _ in _writers(target, fault):
            held = cells[record.tensor]
            raise PlanError(
                f"{target.name}: {_span(fault, target)} come from checkpoint tensor "
                f"{record.tensor!r}, of which the ranks hold {held.numel} elements of shape "
                f"{list(held.shape)}",
                hint="every element must be held by some rank: check the declared boxes",
                tensor=record.tensor,
                faults=len(holes),
                **context,
            )
        others = sorted({record.tensor for record, _ in target.copies})
        near = nearest(target.region.name, sorted(cells))
        raise ManifestError(
            f"{target.name}: no checkpoint tensor fills {_span(fault, target)}"
            + (f"; the rest of it comes from {', '.join(others[:8])}" if others else ""),
            hint="a tensor is missing from the manifest"
            + (f"; names like it that are there: {', '.join(near)}" if near else ""),
            faults=len(holes),
            regions=sorted({targets[hole.region].region.name for hole in holes}),
            **context,
        )


def _span(fault: Fault, target: _Target) -> str:
    first, stop = fault.start // target.itemsize, -(-fault.stop // target.itemsize)
    return f"bytes [{fault.start}, {fault.stop}) (elements [{first}, {stop}))"


def _writers(target: _Target, fault: Fault) -> Iterator[tuple[CopyRecord, StridedCopy]]:
    """The copies of a target that write some byte of a fault."""
    for record, copy in target.copies:
        runs, length = dst_runs(copy)
        starts = np.atleast_1d(np.asarray(runs, dtype=np.int64)) * target.itemsize
        if ((starts < fault.stop) & (fault.start < starts + length * target.itemsize)).any():
            yield record, copy


# ------------------------------------------------------------------ one rank's part


def _plan_of(
    rank: int, survey: _Survey, targets: Sequence[_Target], places: _Places
) -> TransportPlan:
    slots = Slots.lay_out(*survey.runs[rank])
    made = tuple(fills(survey.pieces[rank], slots))
    # The proof counts what is written; what is written must also have been filled.
    filled_nbytes = sum(math.prod(fill.shape) * itemsize(fill.dtype) for fill in made)
    if filled_nbytes != slots.filled_nbytes:
        raise PlanError(
            f"rank {rank} would fill {filled_nbytes} bytes of {slots.filled_nbytes} that it writes",
            hint="this is a defect of weightsync: please report it with the layout",
        )
    bases = survey.space.bases
    cuts = np.searchsorted(slots.starts, bases).tolist()
    origins = bases.tolist()
    nbytes = slots.stops - slots.starts
    pieces = list(zip(slots.offsets.tolist(), nbytes.tolist(), slots.starts.tolist(), strict=True))
    writes = tuple(
        tuple(
            Write(slot_offset, length, region, start - origins[target])
            for region, target in enumerate(here)
            for slot_offset, length, start in pieces[cuts[target] : cuts[target + 1]]
        )
        for here in places
    )
    return TransportPlan(rank, slots.nbytes, made, writes)
