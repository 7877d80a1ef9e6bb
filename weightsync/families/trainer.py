"""What the ranks of a training job hold of a declared model: FSDP2, HSDP, TP, EP and pipelines."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from weightsync.errors import InputError
from weightsync.families.model import BLOCK, Kernel, Model, Source
from weightsync.geometry import Box
from weightsync.ownership import Holdings


@dataclass(frozen=True)
class TrainerGrid:
    """A training job of ``pp * replicate * fsdp * tp`` ranks; ``tp`` varies fastest.

    Attributes:
        fsdp: FSDP2 shards every parameter along dim 0 as ``torch.chunk`` does: the last shards
            may be smaller, or empty.
        replicate: HSDP: so many copies of the shards.
        tp: Tensor parallel size; its shards are cut again by FSDP.
        ep: Experts, kept as one parameter of all experts a layer, are first spread over so many
            groups, and then sharded within a group.  It is carved out of ``fsdp * tp``, not added.
        pp: Pipeline stages: contiguous layers, the first stages have one more.

    Raises:
        InputError: A size below 1, or an ``ep`` that does not divide ``fsdp * tp``.
    """

    fsdp: int = 1
    replicate: int = 1
    tp: int = 1
    ep: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        for key in ("fsdp", "replicate", "tp", "ep", "pp"):
            if getattr(self, key) < 1:
                raise InputError(
                    f"a trainer with {key}={getattr(self, key)}", hint="sizes are 1 or more"
                )
        if self.fsdp * self.tp % self.ep:
            raise InputError(
                f"ep={self.ep} does not divide fsdp * tp = {self.fsdp * self.tp}",
                hint="expert parallel groups are carved out of the ranks that shard a copy",
            )

    @property
    def ranks(self) -> int:
        """Ranks of the job."""
        return self.pp * self.replicate * self.fsdp * self.tp


def holdings(model: Model, grid: TrainerGrid) -> Holdings:
    """The boxes of every rank, as :func:`weightsync.plan.build_plan` takes them.

    Of an fp8 weight's scales a rank holds those of every block that its shard touches: the ranks
    that share a block agree on its scale.

    Raises:
        InputError: More pipeline stages than layers.
    """
    if grid.pp > model.layers:
        raise InputError(
            f"{grid.pp} pipeline stages for {model.layers} layers", hint="use fewer stages"
        )
    shards = [_Shard(grid, f, t) for f, t in itertools.product(range(grid.fsdp), range(grid.tp))]
    stages: list[list[dict[str, Sequence[Box]]]] = []
    for stage in range(grid.pp):
        held: list[dict[str, Sequence[Box]]] = [{} for _ in shards]
        layers = _layers(model.layers, stage, grid.pp)
        for kernel in model.kernels:
            if not _in_stage(model, kernel, stage, layers, grid.pp):
                continue
            if kernel.experts:
                _hold_experts(kernel, shards, held, grid)
            else:
                for source in kernel.sources:
                    for shard, boxes in zip(shards, held, strict=True):
                        box = shard.box(source)
                        if box is not None:
                            boxes[source.name] = (box,)
        stages.append(held)
    return [held for stage in stages for _ in range(grid.replicate) for held in stage]


def _layers(layers: int, stage: int, stages: int) -> range:
    base, more = divmod(layers, stages)
    first = stage * base + min(stage, more)
    return range(first, first + base + (stage < more))


def _in_stage(model: Model, kernel: Kernel, stage: int, layers: range, stages: int) -> bool:
    if isinstance(kernel.stage, int):
        return kernel.stage in layers
    last = stage == stages - 1
    if kernel.stage == "last":
        return last
    return stage == 0 or (last and model.tied)


def _chunk(lo: int, hi: int, index: int, count: int) -> tuple[int, int]:
    """The part of ``[lo, hi)`` that ``torch.chunk`` gives to ``index``; empty past the end."""
    size = -(-(hi - lo) // count)
    return min(hi, lo + index * size), min(hi, lo + (index + 1) * size)


class _Shard:
    """One rank's place in a copy of the model.  Equal shapes have equal boxes: made once."""

    def __init__(self, grid: TrainerGrid, fsdp: int, tp: int) -> None:
        self.grid, self.fsdp, self.tp = grid, fsdp, tp
        self._known: dict[tuple[tuple[int, ...], int | None, tuple[int, ...]], Box | None] = {}

    def box(self, source: Source) -> Box | None:
        """What it holds of a parameter of its own; ``None``: nothing."""
        key = (source.shape, source.split, source.scale_of)
        if key not in self._known:
            shape = source.scale_of or source.shape
            lo, hi = [0] * len(shape), list(shape)
            if source.split is not None:
                k = source.split
                lo[k], hi[k] = _chunk(lo[k], hi[k], self.tp, self.grid.tp)
            lo[0], hi[0] = _chunk(lo[0], hi[0], self.fsdp, self.grid.fsdp)
            self._known[key] = _box(source, lo, hi)
        return self._known[key]


def _box(source: Source, lo: Sequence[int], hi: Sequence[int]) -> Box | None:
    """A box of the source; of scales, the blocks that this box of their weight touches."""
    if any(a >= b for a, b in zip(lo, hi, strict=True)):
        return None
    if source.scale_of:
        return Box(tuple(a // BLOCK for a in lo), tuple(-(-b // BLOCK) for b in hi))
    return Box(tuple(lo), tuple(hi))


def _hold_experts(
    kernel: Kernel,
    shards: Sequence[_Shard],
    held: Sequence[dict[str, Sequence[Box]]],
    grid: TrainerGrid,
) -> None:
    """One parameter ``[experts, rows, columns]``: spread by ``ep``, then sharded along dim 0.

    With more ranks than experts dim 0 has nothing left to cut: then every rank has rows of all
    experts of its group.
    """
    each = len(kernel.sources) // kernel.experts
    size = len(shards) // grid.ep
    whole = tuple((Box.whole(source.shape),) for source in kernel.sources[:each])
    for k in range(len(shards)):
        boxes, place, group = held[k], k // grid.ep, k % grid.ep
        first, stop = _chunk(0, kernel.experts, group, grid.ep)
        parts: Sequence[Sequence[Box]] = whole
        if len(shards) <= kernel.experts:
            first, stop = _chunk(first, stop, place, size)
        else:
            parts = _rows(kernel.sources[:each], place, size)
        for expert in range(first, stop):
            for source, part in zip(
                kernel.sources[expert * each : (expert + 1) * each], parts, strict=True
            ):
                if part:
                    boxes[source.name] = part


def _rows(sources: Sequence[Source], index: int, count: int) -> list[tuple[Box, ...]]:
    """The boxes of one expert's tensors where their rows, one below another, are cut."""
    heights = [(source.scale_of or source.shape)[0] for source in sources]
    first, stop = _chunk(0, sum(heights), index, count)
    parts: list[tuple[Box, ...]] = []
    top = 0
    for source, height in zip(sources, heights, strict=True):
        columns = (source.scale_of or source.shape)[1]
        lo, hi = max(0, first - top), min(height, stop - top)
        box = _box(source, (lo, 0), (hi, columns)) if lo < hi else None
        parts.append(() if box is None else (box,))
        top += height
    return parts
