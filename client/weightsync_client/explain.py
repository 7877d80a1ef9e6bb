"""Where every byte of a tensor comes from and goes to: layouts, read for a person.

Pure: integers and names, no tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from weightsync.coverage import nearest
from weightsync.dtypes import itemsize
from weightsync.errors import InputError
from weightsync.geometry import dst_runs, strided_copy
from weightsync.layout import CopyRecord, WorkerLayout
from weightsync.manifest import Manifest

#: names that a part of one is answered with
_NEAR = 5


@dataclass(frozen=True, slots=True)
class Part:
    """One copy out of a checkpoint tensor into a kernel tensor of one worker.

    Attributes:
        agent: Address of the worker's agent.
        place: The worker.
        checkpoint_tensor: Its name.
        checkpoint_dtype: Its element type; where ``kernel_dtype`` is another, values are cast.
        box: First index and end in every dim of the checkpoint tensor; None: it is no box.
        shape: Of the copy.
        src_offset: Elements into the checkpoint tensor, seen as contiguous.
        src_strides: Elements.
        kernel_tensor: Its name.
        module: The module that owns it.
        kernel_dtype: Its element type.
        mode: ``direct``: written to live memory; ``staged``: to a buffer, installed at commit.
        start: First byte of the kernel tensor, in load format, that this copy fills.
        stop: The byte after the last.
        runs: Contiguous runs of bytes that it is in.
        nbytes: Bytes that it fills.
    """

    agent: str
    place: str
    checkpoint_tensor: str
    checkpoint_dtype: str
    box: tuple[tuple[int, int], ...] | None
    shape: tuple[int, ...]
    src_offset: int
    src_strides: tuple[int, ...]
    kernel_tensor: str
    module: str
    kernel_dtype: str
    mode: str
    start: int
    stop: int
    runs: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Gap:
    """Bytes of a kernel tensor that no push writes: padding, or a constant."""

    agent: str
    place: str
    kernel_tensor: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Explanation:
    """Everything about one name.

    Attributes:
        tensor: The name that was asked for, of a checkpoint or a kernel tensor, or of both.
        parts: Every copy from or to it, worker by worker.
        untouched: Bytes of it, as a kernel tensor, that no push writes.
        dropped_by: (agent, place) of workers whose loader takes it and drops it.
    """

    tensor: str
    parts: tuple[Part, ...]
    untouched: tuple[Gap, ...]
    dropped_by: tuple[tuple[str, str], ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def explain(
    tensor: str, manifest: Manifest, workers: Sequence[tuple[str, WorkerLayout]]
) -> Explanation:
    """Find a name in the layouts of all workers.

    Args:
        tensor: Of a checkpoint or a kernel tensor.
        manifest: What the layouts were traced with.
        workers: (agent, layout) of each.

    Raises:
        InputError: Nobody knows the name.
    """
    parts: list[Part] = []
    gaps: list[Gap] = []
    dropped: list[tuple[str, str]] = []
    for agent, layout in workers:
        place = str(layout.place)
        parts += _parts(tensor, manifest, agent, layout)
        gaps += [
            Gap(agent, place, r.name, start, stop)
            for r in layout.regions
            if r.name == tensor
            for start, stop in r.untouched
        ]
        if tensor in layout.skipped:
            dropped.append((agent, place))
    if not (parts or gaps or dropped):
        known = sorted(
            {t.name for t in manifest} | {r.name for _, layout in workers for r in layout.regions}
        )
        if tensor not in known:
            near = nearest(tensor, known) or [name for name in known if tensor in name][:_NEAR]
            raise InputError(
                f"no checkpoint or kernel tensor is called {tensor!r}",
                hint=f"did you mean {', '.join(near)}?"
                if near
                else f"names are as {known[len(known) // 2]}",
                tensor=tensor,
                near=near,
            )
    return Explanation(tensor, tuple(parts), tuple(gaps), tuple(dropped))


def _parts(tensor: str, manifest: Manifest, agent: str, layout: WorkerLayout) -> Iterator[Part]:
    for record in layout.records:
        region = layout.regions[record.region]
        if tensor not in (record.tensor, region.name):
            continue
        copy = strided_copy(
            record.shape, record.src_offset, record.src_strides, record.dst_offset,
            record.dst_strides,
        )  # fmt: skip
        if copy is None:
            continue
        size = itemsize(region.dtype)
        starts, length = dst_runs(copy)
        spec = manifest.by_name[record.tensor]
        yield Part(
            agent=agent,
            place=str(layout.place),
            checkpoint_tensor=record.tensor,
            checkpoint_dtype=spec.dtype,
            box=_box(record, spec.shape),
            shape=record.shape,
            src_offset=record.src_offset,
            src_strides=record.src_strides,
            kernel_tensor=region.name,
            module=region.name.rpartition(".")[0],
            kernel_dtype=region.dtype,
            mode=region.mode,
            start=copy.dst_offset * size,
            stop=(copy.dst_offset + copy.dst_span + 1) * size,
            runs=1 if isinstance(starts, int) else copy.numel // length,
            nbytes=copy.numel * size,
        )


def _box(record: CopyRecord, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...] | None:
    """What of the checkpoint tensor a copy reads, where that is a box, each element once."""
    span = sum((n - 1) * s for n, s in zip(record.shape, record.src_strides, strict=True))
    first, last = record.src_offset, record.src_offset + span
    box: list[tuple[int, int]] = []
    strides: list[int] = []
    for n in reversed(shape):
        first, lo = divmod(first, n)
        last, hi = divmod(last, n)
        strides.append(strides[-1] * shape[-len(strides)] if strides else 1)
        box.append((lo, hi + 1))
    box.reverse()
    strides.reverse()
    extent = [hi - lo for lo, hi in box]
    if any(n <= 0 for n in extent):
        return None
    # in their shortest forms, sorted by stride, two ways to walk the same elements are equal
    whole = strided_copy(extent, 0, strides, 0, strides)
    return (
        tuple(box)
        if whole == strided_copy(record.shape, 0, record.src_strides, 0, record.src_strides)
        else None
    )
