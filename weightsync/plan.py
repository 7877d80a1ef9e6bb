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

from weightsync.coverage import AddressSpace, Fault, check_names, nearest
from weightsync.dtypes import itemsize
from weightsync.errors import ManifestError, PlanError
from weightsync.geometry import Int64s, dst_runs
from weightsync.layout import CopyRecord, WorkerLayout
from weightsync.lending import LEND_NBYTES, Lendable, Lent, lend
from weightsync.manifest import Manifest
from weightsync.ownership import Cells, Gathered, Holdings, Share, assign
from weightsync.slots import Fill, Pieces, Round, Slots, Write, fills, round_nbytes
from weightsync.survey import Runs, address_space, all_runs, pieces_of
from weightsync.targets import Places, Target, find_targets

__all__ = [
    "Fill", "Holdings", "Job", "Round", "TransportPlan", "Write", "build_plan", "build_plans",
]  # fmt: skip

#: replicated tensors are shared out in parts of at least this: small enough to balance, large
#: enough that a part's descriptor costs nothing beside its bytes
SPLIT_NBYTES = 16 << 20
#: what a publisher gathers if it is not told otherwise
COALESCE_NBYTES = 2 << 20


@dataclass(frozen=True)
class TransportPlan:
    """One rank's slots and writes for one epoch.

    Attributes:
        rank: The writing rank.
        slot_nbytes: Bytes of slot memory that it needs.
        rounds: What goes through the slot memory, in this order.  From the third round on each
            takes the memory of the last but one.
        shares: What this rank gives to others, or takes, before the slots are filled.
        lent: The tensors and boxes that are written, in part at least, from where they are.
        origins: Where each lendable block begins behind the slots: a write's ``slot_offset`` counts
            through both.
    """

    rank: int
    slot_nbytes: int
    rounds: tuple[Round, ...]
    shares: tuple[Share, ...] = ()
    lent: tuple[tuple[str, int], ...] = ()
    origins: tuple[int, ...] = ()

    @property
    def fills(self) -> tuple[Fill, ...]:
        """Of all rounds."""
        return tuple(fill for each in self.rounds for fill in each.fills)

    @cached_property
    def writes(self) -> tuple[tuple[Write, ...], ...]:
        """For every worker the writes of all rounds, in the order in which it is told of them."""
        if len(self.rounds) == 1:
            return self.rounds[0].writes
        return tuple(
            tuple(write for writes in of_rounds for write in writes)
            for of_rounds in zip(*(each.writes for each in self.rounds), strict=True)
        )

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
    coalesce_nbytes: int = 0,
    max_slot_nbytes: int | None = None,
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
        coalesce_nbytes: Tensors of at most this many bytes that are cut over several ranks are
            gathered on one of them (:attr:`TransportPlan.shares`); 0: none.
        max_slot_nbytes: Bound of ``slot_nbytes``; what does not fit goes in rounds.

    Raises:
        ManifestError: A tensor that no engine knows, or kernel bytes for which there is none.
        PlanError: Bytes that no rank holds, bytes written twice, a broken layout, or a bound of
            slot memory that is too small.
    """
    return build_plans(
        manifest,
        layouts,
        holdings,
        ranks=[rank],
        allow_skipped=allow_skipped,
        split_nbytes=split_nbytes,
        coalesce_nbytes=coalesce_nbytes,
        max_slot_nbytes=max_slot_nbytes,
    )[0]


def build_plans(
    manifest: Manifest,
    layouts: Sequence[WorkerLayout],
    holdings: Holdings | None = None,
    *,
    ranks: Sequence[int] | None = None,
    allow_skipped: Sequence[str] = (),
    split_nbytes: int = SPLIT_NBYTES,
    coalesce_nbytes: int = 0,
    max_slot_nbytes: int | None = None,
) -> list[TransportPlan]:
    """The plans of several ranks (default: all), as :func:`build_plan` makes each."""
    world_size = 1 if holdings is None else len(holdings)
    ranks = range(world_size) if ranks is None else ranks
    if not all(0 <= rank < world_size for rank in ranks):
        raise PlanError(
            f"no such rank among {list(ranks)}: {world_size} ranks declared what they hold",
            hint="every rank gathers the holdings of all ranks",
        )
    job = Job.of(
        manifest,
        layouts,
        holdings,
        allow_skipped=allow_skipped,
        split_nbytes=split_nbytes,
        coalesce_nbytes=coalesce_nbytes,
    )
    job.prove()
    return [job.plan(rank, max_slot_nbytes=max_slot_nbytes) for rank in ranks]


@dataclass(frozen=True, eq=False)
class Job:
    """What all ranks together write, before it is cut into plans.

    Attributes:
        targets: What the workers want, once each.
        places: For every worker, the target of each of its regions.
        cells: Who writes each tensor.
        gathered: What ranks give each other first.
    """

    targets: list[Target]
    places: Places
    cells: dict[str, Cells]
    gathered: list[Gathered]

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        layouts: Sequence[WorkerLayout],
        holdings: Holdings | None = None,
        *,
        allow_skipped: Sequence[str] = (),
        split_nbytes: int = SPLIT_NBYTES,
        coalesce_nbytes: int = 0,
    ) -> Job:
        """Share the work out; arguments and errors as of :func:`build_plan`.

        Whether it comes out whole is not known before :meth:`prove`.
        """
        if not layouts:
            raise PlanError("no worker has a layout", hint="make a rendezvous with an agent first")
        targets, places = find_targets(manifest, layouts)
        check_names(manifest, layouts, allow_skipped=allow_skipped)
        wire: dict[str, int] = {}
        for target in targets:
            each = target.itemsize * len(target.workers)
            for record, form in zip(target.records, target.forms, strict=True):
                wire[record.tensor] = wire.get(record.tensor, 0) + form.numel * each
        owned = assign(
            manifest, holdings, wire, split_nbytes=split_nbytes, coalesce_nbytes=coalesce_nbytes
        )
        return cls(targets, places, owned.cells, owned.gathered)

    @cached_property
    def space(self) -> AddressSpace:
        """One address space for all targets."""
        return address_space(self.targets)

    @cached_property
    def runs(self) -> Runs:
        """Every byte that some rank writes."""
        return all_runs(self.targets, self.space, self.cells)

    def prove(self) -> None:
        """The coverage proof: all ranks together write every byte once.

        One rank may do it for all, since all have the same job; each worker proves its own part
        again when it is told of the writes.

        Raises:
            ManifestError: Kernel bytes for which there is no tensor.
            PlanError: Bytes that no rank holds, or that are written twice.
        """
        _prove(self)

    def plan(
        self,
        rank: int,
        *,
        max_slot_nbytes: int | None = None,
        lendable: Lendable | None = None,
        lend_nbytes: int = LEND_NBYTES,
    ) -> TransportPlan:
        """One rank's part.  It costs what the rank holds, not what the job is.

        Args:
            rank: Whose.
            max_slot_nbytes: Bound of its slot memory.
            lendable: What may be written from where it is; it takes no slots.
            lend_nbytes: Least bytes in one run of it.

        Raises:
            PlanError: The bound of the slot memory is too small.
        """
        return _plan_of(rank, self, max_slot_nbytes, lendable or Lendable(), lend_nbytes)


# ------------------------------------------------------------------ the proof


def _prove(job: Job) -> None:
    targets, cells = job.targets, job.cells
    holes, twice = job.space.faults(
        job.runs.starts, job.runs.stops, [target.region.untouched for target in targets]
    )
    if twice:
        fault, target = twice[0], targets[twice[0].region]
        tensors = [record.tensor for record in _writers(target, fault)]
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
        for record in _writers(target, fault):
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
        others = sorted({record.tensor for record in target.records})
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


def _span(fault: Fault, target: Target) -> str:
    first, stop = fault.start // target.itemsize, -(-fault.stop // target.itemsize)
    return f"bytes [{fault.start}, {fault.stop}) (elements [{first}, {stop}))"


def _writers(target: Target, fault: Fault) -> Iterator[CopyRecord]:
    """The copies of a target that write some byte of a fault."""
    size = target.itemsize
    for record, form in zip(target.records, target.forms, strict=True):
        if form.copy is None:
            continue
        runs, length = dst_runs(form.copy)
        starts = (np.atleast_1d(np.asarray(runs, dtype=np.int64)) + record.dst_offset) * size
        if ((starts < fault.stop) & (fault.start < starts + length * size)).any():
            yield record


# ------------------------------------------------------------------ one rank's part


def _plan_of(
    rank: int, job: Job, max_slot_nbytes: int | None, lendable: Lendable, lend_nbytes: int
) -> TransportPlan:
    pieces, starts, stops, counts = pieces_of(rank, job.targets, job.space, job.cells)
    lent, mask = lend(pieces, lendable, lend_nbytes)
    if lent.boxes:
        copied = np.repeat(~mask, counts)
        starts, stops = starts[copied], stops[copied]
        pieces = [piece for piece, away in zip(pieces, mask.tolist(), strict=True) if not away]
    slots = Slots.lay_out(starts, stops)
    each_nbytes = round_nbytes(slots.nbytes, max_slot_nbytes)
    parts = slots.rounds(each_nbytes)
    if len(parts) == 1:
        made = [tuple(fills(pieces, slots))]
    else:
        by_address = Pieces(pieces)
        made = [
            tuple(fills(by_address.between(int(part.starts[0]), int(part.stops[-1])), part))
            for part in parts
        ]
    for some, part in zip(made, parts, strict=True):
        # The proof counts what is written; what is written must also have been filled.
        filled_nbytes = sum(math.prod(fill.shape) * itemsize(fill.dtype) for fill in some)
        if filled_nbytes != part.filled_nbytes:
            raise PlanError(
                f"rank {rank} would fill {filled_nbytes} bytes of {part.filled_nbytes} that it "
                "writes",
                hint="this is a defect of weightsync: please report it with the layout",
            )
    slot_nbytes = slots.nbytes if len(parts) == 1 else 2 * each_nbytes
    origins = lendable.origins(slot_nbytes)
    writes = _writes(job, parts, lent, origins)
    return TransportPlan(
        rank,
        slot_nbytes,
        tuple(Round(some, here) for some, here in zip(made, writes, strict=True)),
        tuple(share for gathered in job.gathered for share in gathered.shares(rank)),
        lent.boxes,
        tuple(origins.tolist()),
    )


def _writes(
    job: Job, parts: Sequence[Slots], lent: Lent, blocks: Int64s
) -> list[tuple[tuple[Write, ...], ...]]:
    """Of every round, the writes to every worker; what is lent is in the first."""
    rounds = [np.full(len(part.starts), k, dtype=np.int64) for k, part in enumerate(parts)]
    starts = np.concatenate([*(part.starts for part in parts), lent.starts])
    stops = np.concatenate([*(part.stops for part in parts), lent.stops])
    offsets = np.concatenate(
        [*(part.offsets for part in parts), blocks[lent.blocks] + lent.offsets]
    )
    order = np.argsort(starts, kind="stable")  # rounds follow the addresses
    columns = (
        np.concatenate([*rounds, np.zeros(len(lent.starts), dtype=np.int64)]),
        offsets,
        stops - starts,
        starts,
    )
    merged = list(zip(*(column[order].tolist() for column in columns), strict=True))
    cuts = np.searchsorted(starts[order], job.space.bases).tolist()
    origins = job.space.bases.tolist()
    # Workers that want all alike have one list of places, and get one tuple of writes.
    by_place: dict[int, list[tuple[Write, ...]]] = {}
    for here in job.places:
        if id(here) in by_place:
            continue
        found: list[list[Write]] = [[] for _ in parts]
        for region, target in enumerate(here):
            for k, slot_offset, length, start in merged[cuts[target] : cuts[target + 1]]:
                found[k].append(Write(slot_offset, length, region, start - origins[target]))
        by_place[id(here)] = [tuple(writes) for writes in found]
    return [tuple(by_place[id(here)][k] for here in job.places) for k in range(len(parts))]
