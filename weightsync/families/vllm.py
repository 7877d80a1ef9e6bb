"""How vLLM lays out a declared model over the workers of one engine.

What is written here is what vLLM 0.32 does; tests trace its own loader under every kind of grid
and compare.  A real push never uses this: there the layout comes from the trace alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from weightsync.dtypes import itemsize
from weightsync.errors import InputError
from weightsync.families.model import BLOCK, Kernel, Model, Source
from weightsync.families.strides import numel_of, row_major
from weightsync.layout import CopyRecord, KernelRegion, WorkerLayout, WorkerPlace

#: the vocabulary is padded to a multiple of this, and then cut
VOCAB_ALIGN = 64
_ALIGN_NBYTES = 256


@dataclass(frozen=True)
class EngineGrid:
    """One engine: ``tp`` × ``dp`` × ``pp`` workers.

    Attributes:
        tp: Tensor parallel size.
        dp: Data parallel size; attention is replicated, experts are spread over all of it.
        pp: Pipeline stages.
        expert_parallel: Whole experts on each worker; otherwise every expert is cut by all.

    Raises:
        InputError: A size below 1.
    """

    tp: int = 1
    dp: int = 1
    pp: int = 1
    expert_parallel: bool = False

    def __post_init__(self) -> None:
        for key in ("tp", "dp", "pp"):
            if getattr(self, key) < 1:
                raise InputError(
                    f"an engine with {key}={getattr(self, key)}", hint="sizes are 1 or more"
                )

    @property
    def workers(self) -> int:
        """Workers of the engine."""
        return self.tp * self.dp * self.pp

    def ways(self, kernel: Kernel) -> int:
        """Into how many parts a kernel tensor's sources are cut."""
        if kernel.experts:
            return 1 if self.expert_parallel else self.tp * self.dp
        # Tokens are cut between the workers then, and shared experts see a part of them whole.
        if kernel.sequence and self.expert_parallel and self.tp > 1 and self.dp > 1:
            return 1
        return self.tp

    def places(self) -> Iterator[WorkerPlace]:
        """Every worker's place, in the order of the layouts."""
        for dp in range(self.dp):
            for pp in range(self.pp):
                for tp in range(self.tp):
                    ep = dp * self.tp + tp if self.expert_parallel else 0
                    yield WorkerPlace(dp=dp, pp=pp, tp=tp, ep=ep)


def engine_layouts(model: Model, grid: EngineGrid) -> list[WorkerLayout]:
    """The layout of every worker of one engine.

    Regions have made-up addresses.  Workers with equal content share one tuple of regions and one
    of records.

    Raises:
        InputError: The grid does not divide the model as vLLM needs it.
    """
    _check(model, grid)
    stages = [_layers(model.layers, stage, grid.pp) for stage in range(grid.pp)]
    moe = any(kernel.experts for kernel in model.kernels)
    known: dict[tuple[int, int, int], WorkerLayout] = {}
    layouts = []
    for place in grid.places():
        # Without experts the data-parallel copies of a worker are alike.
        key = (place.pp, place.tp, place.dp if moe else 0)
        if key not in known:
            known[key] = _Worker(model, grid, place, stages[place.pp]).layout()
        like = known[key]
        layouts.append(WorkerLayout(place, like.regions, like.records, like.skipped))
    return layouts


def _layers(layers: int, stage: int, stages: int) -> range:
    """The layers of a pipeline stage: what is left over goes to the stages before the last."""
    sizes = [layers // stages] * stages
    for back in range(2, layers % stages + 2):
        sizes[-back] += 1
    return range(sum(sizes[:stage]), sum(sizes[: stage + 1]))


def _check(model: Model, grid: EngineGrid) -> None:
    if grid.pp > model.layers:
        raise InputError(
            f"{grid.pp} pipeline stages for {model.layers} layers", hint="use fewer stages"
        )
    for kernel in model.kernels:
        if kernel.experts and grid.expert_parallel and grid.tp * grid.dp > kernel.experts:
            raise InputError(
                f"{grid.tp * grid.dp} expert-parallel workers for {kernel.experts} experts",
                hint="every worker needs an expert: use a smaller engine",
            )
        ways = grid.ways(kernel)
        for source in kernel.sources[: 3 if kernel.experts else None]:
            _check_source(kernel, source, ways)


def _check_source(kernel: Kernel, source: Source, ways: int) -> None:
    if source.split is None or ways == 1:
        return
    n = source.shape[source.split]
    if kernel.vocab:
        n = -(-n // VOCAB_ALIGN) * VOCAB_ALIGN
    parts = _parts(source, ways)
    if source.scale_of:
        n = source.scale_of[source.split]
        if n % parts or n // parts % BLOCK:
            raise InputError(
                f"{source.name}: {n} cut {parts} ways is not a multiple of the fp8 block of "
                f"{BLOCK}",
                hint="cut it fewer ways, spread whole experts (ep=), or use --wire-dtype bf16",
            )
    if n % parts or ways % parts or (source.heads and source.heads % parts):
        raise InputError(
            f"{source.name}: dim {source.split} of {n}"
            + (f" ({source.heads} heads)" if source.heads else "")
            + f" cannot be cut {ways} ways",
            hint="choose a tensor parallel size that divides the model",
        )


def _parts(source: Source, ways: int) -> int:
    """Into how many parts ``ways`` workers cut it."""
    return min(ways, source.heads) if source.shared else ways


class _Worker:
    """Lays out one worker."""

    def __init__(self, model: Model, grid: EngineGrid, place: WorkerPlace, layers: range) -> None:
        self.model, self.grid, self.place, self.layers = model, grid, place, layers
        self.regions: list[KernelRegion] = []
        self.records: list[CopyRecord] = []
        self.end = 0

    def layout(self) -> WorkerLayout:
        """Go through the kernel tensors in order."""
        for kernel in self.model.kernels:
            if not self._has(kernel):
                continue
            if kernel.experts:
                self._stacked(kernel)
            elif kernel.vocab:
                self._vocabulary(kernel)
            else:
                self._fused(kernel)
        used = {record.tensor for record in self.records}
        skipped = tuple(
            source.name for _, _, source in self.model.checkpoint() if source.name not in used
        )
        return WorkerLayout(self.place, tuple(self.regions), tuple(self.records), skipped)

    def _has(self, kernel: Kernel) -> bool:
        if isinstance(kernel.stage, int):
            return kernel.stage in self.layers
        last = self.place.pp == self.grid.pp - 1
        if self.model.ends_everywhere:
            return True
        if kernel.stage == "last":
            return last
        return self.place.pp == 0 or (last and self.model.tied)

    def _region(
        self, kernel: Kernel, shape: tuple[int, ...], untouched: tuple[tuple[int, int], ...] = ()
    ) -> None:
        nbytes = numel_of(shape) * itemsize(kernel.dtype)
        addr = self.end
        self.end = -(-(addr + nbytes) // _ALIGN_NBYTES) * _ALIGN_NBYTES
        self.regions.append(
            KernelRegion(
                kernel.name, kernel.dtype, shape, nbytes, "direct", addr, "VRAM", 0, untouched
            )
        )

    def _fused(self, kernel: Kernel) -> None:
        rows = offset = 0
        ways = self.grid.ways(kernel)
        shape: tuple[int, ...] = ()
        for source in kernel.sources:
            shape, begin, strides = _part(source, ways, self.place.tp)
            self.records.append(
                CopyRecord(
                    source.name, shape, begin, strides, len(self.regions), offset, row_major(shape)
                )
            )
            rows += shape[0]
            offset += numel_of(shape)
        self._region(kernel, (rows, *shape[1:]))

    def _vocabulary(self, kernel: Kernel) -> None:
        (source,) = kernel.sources
        vocab, columns = source.shape
        rows = -(-vocab // VOCAB_ALIGN) * VOCAB_ALIGN // self.grid.tp
        first = self.place.tp * rows
        real = max(0, min(first + rows, vocab) - first)
        if real:
            self.records.append(
                CopyRecord(
                    source.name, (real, columns), first * columns, (columns, 1),
                    len(self.regions), 0, (columns, 1),
                )
            )  # fmt: skip
        row_nbytes = columns * itemsize(kernel.dtype)
        padding = ((real * row_nbytes, rows * row_nbytes),) if real < rows else ()
        self._region(kernel, (rows, columns), padding)

    def _stacked(self, kernel: Kernel) -> None:
        ways, index = self.grid.tp * self.grid.dp, self.place.dp * self.grid.tp + self.place.tp
        each = len(kernel.sources) // kernel.experts
        first, stop = 0, kernel.experts
        if self.grid.expert_parallel:
            # Linear placement: the first workers have one more where it doesn't come out even.
            base, more = divmod(kernel.experts, ways)
            first = index * base + min(index, more)
            stop = first + base + (index < more)
            ways = index = 0
        parts = [_part(source, ways, index) for source in kernel.sources[:each]]
        region, offset = len(self.regions), 0
        # Experts are alike, so what a part looks like is worked out once.
        made = [(shape, begin, strides, row_major(shape), numel_of(shape))
                for shape, begin, strides in parts]  # fmt: skip
        for k in range(first * each, stop * each):
            shape, begin, strides, dst_strides, numel = made[k % each]
            self.records.append(
                CopyRecord(
                    kernel.sources[k].name, shape, begin, strides, region, offset, dst_strides
                )
            )
            offset += numel
        rows = sum(shape[0] for shape, _, _ in parts)
        self._region(kernel, (stop - first, rows, *parts[0][0][1:]))


def _part(source: Source, ways: int, index: int) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """Shape, first element and strides of a worker's part of a checkpoint tensor."""
    strides = row_major(source.shape)
    if source.split is None or ways <= 1:
        return source.shape, 0, strides
    parts = _parts(source, ways)
    n = source.shape[source.split] // parts
    shape = (*source.shape[: source.split], n, *source.shape[source.split + 1 :])
    return shape, index * parts // ways * n * strides[source.split], strides
