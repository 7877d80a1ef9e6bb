"""What workers want, once each: equal contents and equal forms of copies are found and shared.

A job of a trillion parameters has millions of copies of a few forms, and dozens of workers that
want the same; the work of a plan is done once for each that differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from weightsync.coverage import check_record, check_untouched
from weightsync.dtypes import itemsize
from weightsync.errors import PlanError
from weightsync.geometry import StridedCopy, strided_copy
from weightsync.layout import CopyRecord, KernelRegion, WorkerLayout
from weightsync.manifest import Manifest


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """A copy but for where it goes: records that differ in their destination alone share one.

    Attributes:
        copy: The copy to destination 0; ``None``: it has no elements.
        numel: Elements.
        dst_span: Distance from its first to its last element in the destination.
    """

    copy: StridedCopy | None
    numel: int
    dst_span: int


@dataclass(slots=True, eq=False)
class Target:
    """Region content that one or more workers want alike.

    Attributes:
        layout: The first worker's.
        region: Its region.
        itemsize: Bytes of an element.
        records: The copies into it that have elements.
        forms: The form of each of them.
        workers: The workers that want it, by their place among the layouts.
    """

    layout: WorkerLayout
    region: KernelRegion
    itemsize: int
    records: list[CopyRecord] = field(default_factory=list)
    forms: list[Form] = field(default_factory=list)
    workers: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What to call it in errors."""
        return f"kernel tensor {self.region.name!r} of {self.layout.place}"


#: for every worker, the index of each region's target; workers that want all alike share one list
Places = list[list[int]]


def find_targets(
    manifest: Manifest, layouts: Sequence[WorkerLayout]
) -> tuple[list[Target], Places]:
    """Everything that is wanted, once, and where each worker wants it.

    Raises:
        ManifestError: A copy from a tensor that is not in the manifest.
        PlanError: A broken layout.
    """
    finder = _Finder(manifest)
    places: Places = []
    distinct: list[tuple[WorkerLayout, list[int]]] = []
    for worker, layout in enumerate(layouts):
        here = next((place for known, place in distinct if alike(known, layout)), None)
        if here is None:
            here = finder.add(layout)
            distinct.append((layout, here))
        places.append(here)
        for target in here:
            finder.targets[target].workers.append(worker)
    return finder.targets, places


def alike(one: WorkerLayout, other: WorkerLayout) -> bool:
    """Whether two workers want the same into regions that differ in their addresses at most."""
    if one.regions is not other.regions and [_outline(r) for r in one.regions] != [
        _outline(r) for r in other.regions
    ]:
        return False
    return one.records == other.records


def _outline(region: KernelRegion) -> object:
    return region.dtype, region.nbytes, region.untouched


class _Finder:
    def __init__(self, manifest: Manifest) -> None:
        self.targets: list[Target] = []
        self._manifest = manifest
        self._forms: dict[object, Form] = {}
        self._seen: dict[object, list[int]] = {}

    def add(self, layout: WorkerLayout) -> list[int]:
        """The targets of a layout's regions."""
        wanted: list[list[CopyRecord]] = [[] for _ in layout.regions]
        for record in layout.records:
            if not 0 <= record.region < len(wanted):
                raise PlanError(
                    f"{layout.place}: a copy from {record.tensor!r} goes to region "
                    f"{record.region} of {len(wanted)}",
                    hint="the engine's layout is broken: trace it again",
                )
            wanted[record.region].append(record)
        return [
            self._target(layout, region, records)
            for region, records in zip(layout.regions, wanted, strict=True)
        ]

    def _target(self, layout: WorkerLayout, region: KernelRegion, records: list[CopyRecord]) -> int:
        # Few targets agree in their first copy and differ later, so that is what they go by.
        key = (_outline(region), len(records), _content(records[0]) if records else None)
        candidates = self._seen.setdefault(key, [])
        for index in candidates:
            mine = self.targets[index]
            if len(mine.records) == len(records) and all(
                _content(a) == _content(b) for a, b in zip(mine.records, records, strict=True)
            ):
                return index
        target = Target(layout, region, itemsize(region.dtype))
        check_untouched(region, target.name)
        for record in records:
            form = self._form(record, target)
            if form.copy is not None:
                target.records.append(record)
                target.forms.append(form)
        candidates.append(len(self.targets))
        self.targets.append(target)
        return candidates[-1]

    def _form(self, record: CopyRecord, target: Target) -> Form:
        spec = self._manifest.by_name.get(record.tensor)
        key = (
            record.shape,
            record.src_offset,
            record.src_strides,
            record.dst_strides,
            None if spec is None else spec.shape,
        )
        form = self._forms.get(key)
        end = 0 if form is None else (record.dst_offset + form.dst_span + 1) * target.itemsize
        if form is None or record.dst_offset < 0 or end > target.region.nbytes:
            # A form is checked once; where it goes is all that can be wrong after that.
            check_record(record, self._manifest, target.layout, target.itemsize)
        if form is None:
            copy = strided_copy(
                record.shape, record.src_offset, record.src_strides, 0, record.dst_strides
            )
            numel, span = (0, 0) if copy is None else (copy.numel, copy.dst_span)
            form = self._forms[key] = Form(copy, numel, span)
        return form


def _content(record: CopyRecord) -> tuple[object, ...]:
    return (
        record.tensor,
        record.shape,
        record.src_offset,
        record.src_strides,
        record.dst_offset,
        record.dst_strides,
    )
