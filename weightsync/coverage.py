"""The proof that a push is whole: every byte written exactly once, every tensor accounted for."""

from __future__ import annotations

import difflib
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from weightsync.errors import ManifestError, PlanError
from weightsync.geometry import Int64s, gaps_and_overlaps
from weightsync.layout import CopyRecord, KernelRegion, WorkerLayout
from weightsync.manifest import Manifest

#: names that a message lists; the error's context has all of them
_SHOWN = 8
#: candidates for "did you mean"; difflib is slow
_NEAR = 1000
#: a region's place in the address space is a multiple of this, so offsets keep their alignment
_ALIGN = 64
_MAX_ADDRESS = 1 << 62
_REPLAN = "the trainer planned with another layout: make a new rendezvous"


@dataclass(frozen=True, slots=True)
class Fault:
    """Bytes ``[start, stop)`` of region ``region`` that are not written, or more than once."""

    region: int
    start: int
    stop: int


class AddressSpace:
    """Regions laid one behind another with a gap between, so that one sort serves all of them.

    Args:
        sizes: Bytes of each region.

    Raises:
        PlanError: A size is negative, or the sum is beyond all memory.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        bases = [0]
        for size in sizes:
            if not 0 <= size < _MAX_ADDRESS - bases[-1]:
                raise PlanError(
                    f"a kernel region of {size} bytes", hint="the engine's layout is broken"
                )
            bases.append((bases[-1] + size) // _ALIGN * _ALIGN + _ALIGN)
        self.bases: Int64s = np.array(bases, dtype=np.int64)
        self.ends: Int64s = self.bases[:-1] + np.array(sizes, dtype=np.int64)

    def faults(
        self, starts: Int64s, stops: Int64s, untouched: Sequence[Sequence[tuple[int, int]]]
    ) -> tuple[list[Fault], list[Fault]]:
        """Find what is not written exactly once.

        Args:
            starts: First addresses of the writes.
            stops: Their ends.
            untouched: For every region its byte intervals that nothing may write.

        Returns:
            Bytes that are neither written nor untouched, and bytes that are claimed twice.
        """
        kept = [
            (base + start, base + stop)
            for base, intervals in zip(self.bases.tolist(), untouched, strict=False)
            for start, stop in intervals
        ]
        still = np.array(kept, dtype=np.int64).reshape(-1, 2)
        # The gaps between the regions, and what lies before the first one, count as written.
        fence_starts = np.concatenate(([-1], self.ends))
        gaps, overlaps = gaps_and_overlaps(
            np.concatenate((starts, still[:, 0], fence_starts)),
            np.concatenate((stops, still[:, 1], self.bases)),
        )
        return self._locate(gaps), self._locate(overlaps)

    def _locate(self, intervals: Int64s) -> list[Fault]:
        regions = np.searchsorted(self.bases, intervals[:, 0], side="right") - 1
        return [
            Fault(region, start - int(self.bases[region]), stop - int(self.bases[region]))
            for region, (start, stop) in zip(regions.tolist(), intervals.tolist(), strict=True)
        ]


def check_untouched(region: KernelRegion, where: str) -> None:
    """Check that a region's untouched intervals lie in it.

    Raises:
        PlanError: One does not, or has no bytes.
    """
    for start, stop in region.untouched:
        if not 0 <= start < stop <= region.nbytes:
            raise PlanError(
                f"{where}: untouched bytes [{start}, {stop}) are no part of its {region.nbytes}",
                hint="the engine's layout is broken: trace it again",
                region=region.name,
            )


def check_record(
    record: CopyRecord, manifest: Manifest, layout: WorkerLayout, itemsize: int
) -> None:
    """Check that a record reads within its checkpoint tensor and writes within its region.

    Raises:
        ManifestError: Its checkpoint tensor is not in the manifest.
        PlanError: It leaves the tensor or the region, or writes an element twice.
    """
    region = layout.regions[record.region]
    where = f"kernel tensor {region.name!r} of {layout.place}"
    spec = manifest.by_name.get(record.tensor)
    first = record.dst_offset * itemsize
    if spec is None:
        near = nearest(record.tensor, sorted(manifest.by_name))
        raise ManifestError(
            f"{where}, from byte {first}, comes from checkpoint tensor {record.tensor!r}, which "
            "is not in the manifest",
            hint=f"hand it over; nearest names: {', '.join(near)}" if near else "hand it over",
            region=region.name,
            tensor=record.tensor,
        )
    rank = len(record.shape)
    numbers = (
        *record.shape,
        *record.src_strides,
        *record.dst_strides,
        record.src_offset,
        record.dst_offset,
    )
    if rank != len(record.src_strides) or rank != len(record.dst_strides) or min(numbers) < 0:
        raise PlanError(
            f"{where}: not a strided copy: {record}", hint="the engine's layout is broken"
        )
    if 0 in record.shape:
        return
    src_last = record.src_offset
    dst_last, numel = record.dst_offset, 1
    for n, s, d in zip(record.shape, record.src_strides, record.dst_strides, strict=True):
        src_last += (n - 1) * s
        dst_last += (n - 1) * d
        numel *= n
    if src_last >= spec.numel:
        raise PlanError(
            f"{where}: its copy reads element {src_last} of checkpoint tensor {record.tensor!r}, "
            f"which has {spec.numel}",
            hint="the engine traced another manifest: make a new rendezvous",
            region=region.name,
            tensor=record.tensor,
        )
    if (dst_last + 1) * itemsize > region.nbytes:
        raise PlanError(
            f"{where}: the copy from {record.tensor!r} ends at byte {(dst_last + 1) * itemsize} "
            f"of {region.nbytes}",
            hint="the engine's layout is broken: trace it again",
            region=region.name,
            tensor=record.tensor,
        )
    if numel > dst_last - record.dst_offset + 1:
        raise PlanError(
            f"{where}: the copy from {record.tensor!r} writes {numel} elements into "
            f"{dst_last - record.dst_offset + 1}",
            hint="a byte may be written once only (WS-7)",
            region=region.name,
            tensor=record.tensor,
        )


def check_names(
    manifest: Manifest, layouts: Sequence[WorkerLayout], *, allow_skipped: Sequence[str] = ()
) -> None:
    """Check that every tensor of the manifest goes somewhere, or is dropped for a known reason.

    Args:
        manifest: What the trainer makes.
        layouts: Every worker's layout.
        allow_skipped: Shell patterns of names that all loaders may drop.

    Raises:
        ManifestError: A tensor that every engine drops; ``context["names"]`` lists all of them.
        PlanError: A tensor that no worker copies and some worker does not even know.
    """
    # Workers that want all alike may share their records.
    distinct = {id(layout.records): layout.records for layout in layouts}.values()
    used = {record.tensor for records in distinct for record in records}
    # Tied tensors are one memory: whichever of them the engine takes will do.
    tied = {spec.alias_of or spec.name for spec in manifest if spec.name in used}
    left = [
        spec
        for spec in manifest
        if spec.name not in used
        and spec.numel
        and (spec.alias_of or spec.name) not in tied
        and spec.alias_of not in used
    ]
    if not left:
        return
    skipped = [set(layout.skipped) for layout in layouts]
    unknown: list[str] = []
    for spec in left:
        for layout, names in zip(layouts, skipped, strict=True):
            if spec.name not in names:
                raise PlanError(
                    f"checkpoint tensor {spec.name!r} reaches no kernel tensor, and "
                    f"{layout.place} does not report that its loader skips it",
                    hint="the engine traced another manifest: make a new rendezvous",
                    tensor=spec.name,
                )
        if not any(fnmatchcase(spec.name, pattern) for pattern in allow_skipped):
            unknown.append(spec.name)
    if not unknown:
        return
    known = sorted(used)
    lines = []
    for name in unknown[:_SHOWN]:
        near = nearest(name, known)
        lines.append(f"{name!r}" + (f" (did you mean {', '.join(near)}?)" if near else ""))
    more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
    raise ManifestError(
        f"unknown to the engine: {'; '.join(lines)}{more}",
        hint="name them as the engine's loader expects, or allow them to be skipped",
        names=unknown,
    )


def nearest(name: str, known: Sequence[str]) -> list[str]:
    """Up to three names of the sorted list ``known`` that look like ``name``."""
    k = bisect_left(known, name)
    return difflib.get_close_matches(name, known[max(0, k - _NEAR) : k + _NEAR])


def check_writes(
    layout: WorkerLayout, writes_by_rank: Mapping[int, Sequence[tuple[int, int, int]]]
) -> None:
    """A worker's own proof (WS-7): what all ranks declared covers its regions exactly once.

    Args:
        layout: The worker's layout.
        writes_by_rank: For each rank its writes: (region, offset, nbytes), bytes.

    Raises:
        PlanError: A write is out of range, two share a byte, one touches an untouched byte, or a
            byte is left out.
    """
    sizes = [region.nbytes for region in layout.regions]
    space = AddressSpace(sizes)
    for kernel in layout.regions:
        check_untouched(kernel, f"kernel tensor {kernel.name!r} of {layout.place}")
    bases = space.bases.tolist()
    starts: list[int] = []
    stops: list[int] = []
    for rank, writes in writes_by_rank.items():
        for region, offset, nbytes in writes:
            known = 0 <= region < len(sizes)
            if not (known and nbytes > 0 and 0 <= offset <= sizes[region] - nbytes):
                name = repr(layout.regions[region].name) if known else f"of {len(sizes)}"
                raise PlanError(
                    f"rank {rank} declares a write of {nbytes} bytes at byte {offset} of region "
                    f"{region} ({name}) of {layout.place}: out of range",
                    hint=_REPLAN,
                    rank=rank,
                )
            starts.append(bases[region] + offset)
            stops.append(bases[region] + offset + nbytes)
    holes, twice = space.faults(
        np.array(starts, dtype=np.int64),
        np.array(stops, dtype=np.int64),
        [kernel.untouched for kernel in layout.regions],
    )
    for faults, what in (
        (twice, "are written more than once, or written though untouched"),
        (holes, "are not written"),
    ):
        if faults:
            fault, ranks = faults[0], _ranks_at(faults[0], writes_by_rank)
            name = layout.regions[fault.region].name
            raise PlanError(
                f"kernel tensor {name!r} of {layout.place}: bytes [{fault.start}, {fault.stop}) "
                f"{what}" + (f", by ranks {ranks}" if ranks else ""),
                hint=_REPLAN,
                region=name,
                bytes=[fault.start, fault.stop],
                ranks=ranks,
                faults=len(faults),
            )


def _ranks_at(
    fault: Fault, writes_by_rank: Mapping[int, Sequence[tuple[int, int, int]]]
) -> list[int]:
    return [
        rank
        for rank, writes in writes_by_rank.items()
        if any(
            region == fault.region and offset < fault.stop and fault.start < offset + nbytes
            for region, offset, nbytes in writes
        )
    ]
