"""From a rank's weights into its slots: few calls, whatever the count of tensors."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from weightsync.errors import InputError
from weightsync.quantize import (
    BLOCK,
    Prepared,
    Quantized,
    prepare_each,
    quantize,
    touched_blocks,
)
from weightsync_client.converted import ConvertedSource
from weightsync_client.quantized import QuantizedSource
from weightsync_client.quantized_form import Key
from weightsync_client.source import StateDictSource, WeightSource
from weightsync_client.structure import PreparedSource

#: slots up to this are filled together: a call would cost more than the copy
_SMALL_NBYTES = 1 << 20

#: a slot, and what of a contiguous box goes there: shape, strides and offset in elements
Copy = tuple[torch.Tensor, tuple[int, ...], tuple[int, ...], int]


class Rectangle(NamedTuple):
    """Blocks of a box, all of each that is in the box, from ``row`` and ``col`` on.

    ``slot`` is where their fp8 values go: ``[N, K]``, any strides.
    """

    slot: torch.Tensor
    row: int
    col: int


@dataclass(slots=True)
class Job:
    """All copies out of one box of a tensor.

    Attributes:
        name: The tensor's.
        box: Which of its boxes.
        made: What the values are rounded to, before any cast to a slot's dtype (WS-12).
        copies: Where they go.
        shape: The box's, known from the first fill on; then ``copies`` has no more what is in
            ``whole``.
        whole: Slots that take all of the box, seen in its shape.
        blocks: Of fp8, where every block goes, once; empty: some block is cut, or goes elsewhere.
        small: Every slot in ``whole`` is.
        rounds: Some slot has another dtype than ``made``.
    """

    name: str
    box: int
    made: torch.dtype
    copies: list[Copy]
    shape: tuple[int, ...] | None = None
    whole: list[torch.Tensor] = field(default_factory=list)
    blocks: list[Rectangle] = field(default_factory=list)
    small: bool = False
    rounds: bool = False

    @property
    def slots(self) -> tuple[torch.Tensor, ...]:
        """All that is filled."""
        return (*self.whole, *(copy[0] for copy in self.copies))

    def settle(self, shape: tuple[int, ...]) -> None:
        """Take in the box's shape, the same in all pushes of an epoch."""
        every, self.copies, self.shape = self.copies, [], shape
        for slot, size, strides, offset in every:
            alike = strides == slot.stride() and not offset and slot.numel() == math.prod(shape)
            if alike and slot.is_contiguous():
                self.whole.append(slot.view(shape))
            else:
                self.copies.append((slot, size, strides, offset))
        self.small = all(slot.nbytes <= _SMALL_NBYTES for slot in self.whole)
        self.rounds = any(slot.dtype != self.made for slot in self.slots)
        if self.made == torch.float8_e4m3fn and len(shape) == 2 and not self.rounds:
            self.blocks = _blocks(self, shape)


class Round:
    """The jobs of one round of an epoch."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self._straight: _Straight | None = None
        #: by what a source that quantises makes of their tensors
        self._kinds: dict[str | None, list[Job]] = {None: [], "values": [], "scales": []}
        self._known: _Known | None = None

    def fill(self, source: WeightSource) -> None:
        """Carry out all of them; on a GPU they are queued on the current stream.

        Raises:
            InputError: A tensor has not the shape that the source declared.
        """
        if self.jobs and self.jobs[0].shape is None:
            holdings = source.holdings()
            for job in self.jobs:
                job.settle(holdings[job.name][job.box].shape)
        if not isinstance(source, QuantizedSource):
            self._copy_given(self.jobs, source)
            return
        if self._straight is None:
            for job in self.jobs:
                self._kinds[source.makes(job.name)].append(job)
            values = self._kinds["values"]
            straight = [j for j in values if j.blocks and not source.cuts((j.name, j.box))]
            self._straight = _Straight(straight)
        # first: it keeps a GPU busy until the rest is looked at
        done = self._straight.fill(source)
        self._copy_given(self._kinds[None], source.given)
        rest = [j for j in self._kinds["values"] if (j.name, j.box) not in done]
        _copy(rest, source, held=False)
        _copy(self._kinds["scales"], source, held=True)

    def _copy_given(self, jobs: Sequence[Job], source: WeightSource) -> None:
        """Do those jobs that take values as they are."""
        if not isinstance(source, PreparedSource):
            _copy(jobs, source, held=isinstance(source, _Holds))
            return
        if self._known is None or self._known.structure is not source.structure:
            self._known = _Known(jobs, source)
        self._known.fill(source)


class _Known:
    """How the jobs are done from one structure: small tensors that are copied whole are found once.

    Where the structure is the same, so are shapes and dtypes; only the addresses are this push's.
    """

    def __init__(self, jobs: Iterable[Job], source: PreparedSource) -> None:
        self.structure = source.structure
        self._jobs: list[Job] = []
        #: by dtypes: slots, and the number of the tensor that goes into each
        self._together: dict[object, tuple[list[torch.Tensor], list[int]]] = {}
        for job in jobs:
            local = source.local(job.name, job.box)
            number = self.structure.whole(job.name, job.box)
            rounded = job.rounds and local.dtype != job.made
            plain = job.small and not job.copies and local.shape == job.shape
            if number is None or rounded or not plain:
                self._jobs.append(job)
                continue
            for slot in job.whole:
                slots, numbers = self._together.setdefault((local.dtype, slot.dtype), ([], []))
                slots.append(slot)
                numbers.append(number)

    def fill(self, source: PreparedSource) -> None:
        for slots, numbers in self._together.values():
            torch._foreach_copy_(slots, source.tensors(numbers))
        _copy(self._jobs, source, held=True)


class _Straight:
    """Matrices that are quantised into their slots, with no memory between but for the scales.

    Launches are prepared once, and again when a matrix is elsewhere.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._keys = [(job.name, job.box) for job in jobs]
        self._blocks = [job.blocks for job in jobs]
        self._scales: dict[Key, torch.Tensor] = {}
        for job in jobs:
            grid = [-(-n // BLOCK) for n in job.shape or ()]
            self._scales[job.name, job.box] = torch.empty(grid, device=job.blocks[0].slot.device)
        self._seen: Sequence[tuple[object, ...]] = ()
        self._launches: list[Prepared] | None = None

    def fill(self, source: QuantizedSource) -> Collection[Key]:
        """Quantise, if all matrices are on the slots' device; the boxes that it did."""
        values = [source.given.local(*key) for key in self._keys]
        seen = [(t.data_ptr(), t.dtype, t.device, t.shape, t.stride()) for t in values]
        if self._launches is None or seen != self._seen:
            values = [source.values(key) for key in self._keys]
            here = [scales.device for scales in self._scales.values()]
            if [t.device for t in values] != here:
                return ()
            self._launches, self._seen = self._prepare(values), seen
        for launch in self._launches or ():
            launch.run()
        source.was_quantized(self._scales)
        return self._scales.keys()

    # on a CPU there is nothing to prepare: it is done at once
    def _prepare(self, values: Sequence[torch.Tensor]) -> list[Prepared] | None:
        weights, out = [], []
        for t, scales, blocks in zip(values, self._scales.values(), self._blocks, strict=True):
            for slot, row, col in blocks:
                rows, cols = touched_blocks(slot.shape, (row, col))
                weights.append(t[row : row + slot.shape[0], col : col + slot.shape[1]])
                out.append(Quantized(slot, scales[rows, cols]))
        launches = prepare_each(weights, out)
        if launches is None:
            for each, made in zip(weights, out, strict=True):
                quantize(each, out=made)
        return launches


#: sources that have what they hand out; what another makes is kept no longer than it must be
_Holds = StateDictSource | ConvertedSource


def _copy(jobs: Iterable[Job], source: WeightSource, *, held: bool) -> None:
    together: dict[tuple[torch.dtype, ...], list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for job in jobs:
        local = source.local(job.name, job.box)
        if local.shape != job.shape:
            raise InputError(
                f"{job.name!r} has shape {tuple(local.shape)}, declared was {job.shape}",
                hint="weights must not change shape in a push",
                tensor=job.name,
            )
        later = held and job.small
        if job.rounds and local.dtype != job.made:
            local, later = local.to(job.made), False  # WS-12
        for slot in job.whole:
            if later:
                together.setdefault((local.dtype, slot.dtype), []).append((slot, local))
            else:
                slot.copy_(local)
        if not job.copies:
            continue
        # The plan's strides are those of a contiguous box.
        local = local.detach().contiguous()
        start = local.storage_offset()
        for slot, size, strides, offset in job.copies:
            slot.copy_(local.as_strided(size, strides, start + offset))
    for pairs in together.values():
        torch._foreach_copy_([slot for slot, _ in pairs], [local for _, local in pairs])


def _blocks(job: Job, shape: tuple[int, ...]) -> list[Rectangle]:
    found = [Rectangle(slot, 0, 0) for slot in job.whole]
    seen = np.zeros([-(-n // BLOCK) for n in shape], dtype=np.int64)
    for copy in job.copies:
        if (rectangle := _rectangle(copy, shape)) is None:
            return []
        found.append(rectangle)
    for slot, row, col in found:
        seen[touched_blocks(slot.shape, (row, col))] += 1
    return found if (seen == 1).all() else []


def _rectangle(copy: Copy, shape: tuple[int, ...]) -> Rectangle | None:
    """A copy as whole blocks of a matrix; None: it is none, or cuts some."""
    slot, size, strides, offset = copy
    row, col = divmod(offset, shape[1])
    if strides == (1,) and not size[0] % shape[1]:  # whole rows
        slot = slot.unflatten(0, (-1, shape[1]))
    elif strides != (shape[1], 1):
        return None
    ends = row + slot.shape[0], col + slot.shape[1]
    cut = any(n % BLOCK for n in (row, col))
    cut |= any(end > n or (end % BLOCK and end != n) for end, n in zip(ends, shape, strict=True))
    return None if cut else Rectangle(slot, row, col)
