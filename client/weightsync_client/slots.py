"""Slots: registered bytes of a trainer rank, packed in destination order, ready to be written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from weightsync.errors import InputError, NonFiniteError
from weightsync.manifest import Manifest
from weightsync.plan import TransportPlan
from weightsync.slab import Slab
from weightsync.slots import Fill
from weightsync.transport.base import LocalMemory
from weightsync_client.converted import ConvertedSource
from weightsync_client.lending import Loan
from weightsync_client.source import StateDictSource, WeightSource
from weightsync_client.structure import PreparedSource

#: slots up to this are filled together: a call would cost more than the copy
_SMALL_NBYTES = 1 << 20


@dataclass(slots=True)
class _Job:
    """All copies out of one box: where each goes, and what of the box goes there.

    ``shape``, of the box, is known from the first fill on; ``whole`` are then the slots that take
    all of it, seen in its shape, and ``copies`` the others.
    """

    name: str
    box: int
    made: torch.dtype
    rounds: bool
    copies: list[tuple[torch.Tensor, tuple[int, ...], tuple[int, ...], int]]
    shape: tuple[int, ...] | None = None
    whole: list[torch.Tensor] = field(default_factory=list)
    small: bool = False

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


class Slots:
    """The slab of one epoch and how it is filled; views are made once, here.

    Behind the slab, by the plan's offsets, is what the trainer lends: it is written as it is.

    Args:
        plan: Of this rank.
        manifest: Tells the dtype that every tensor is rounded to first.
        device: Where the slab lies.
        loan: What the plan was made with.
    """

    def __init__(
        self, plan: TransportPlan, manifest: Manifest, device: torch.device, loan: Loan
    ) -> None:
        self.slab = Slab(plan.slot_nbytes, device)
        loan.take(plan)
        self._loan = loan
        self._rounds = [self._jobs(each.fills, manifest) for each in plan.rounds]
        self._aside: torch.cuda.Stream | None = None

    def _jobs(self, fills: Iterable[Fill], manifest: Manifest) -> list[_Job]:
        by_box: dict[tuple[str, int], list[Fill]] = {}
        for fill in fills:
            by_box.setdefault((fill.tensor, fill.box), []).append(fill)
        return [
            self._job(name, box, torch_dtype(manifest.by_name[name].dtype), of_box)
            for (name, box), of_box in by_box.items()
        ]

    def _job(self, name: str, box: int, made: torch.dtype, fills: Sequence[Fill]) -> _Job:
        copies = []
        for f in fills:
            dtype = torch_dtype(f.dtype)
            typed = self.slab.data.view(dtype)
            # as_strided counts from the start of the storage; the slab begins some bytes later
            start = typed.storage_offset() + _elems(f.slot_offset, dtype, name)
            slot = typed.as_strided(f.shape, f.slot_strides, start)
            copies.append((slot, f.shape, f.src_strides, f.src_offset))
        return _Job(name, box, made, any(c[0].dtype != made for c in copies), copies)

    @torch.no_grad()
    def fill(self, source: WeightSource, number: int = 0) -> None:
        """Copy a round's values into its slots, rounded to the manifest's dtype, cast as wanted.

        No write from these slots may be in flight (WS-3).  On a GPU the copies are queued on the
        current stream.  The source's memory is looked up anew each time: a trainer may replace its
        tensors.

        Raises:
            InputError: A tensor has not the shape that the source declared.
        """
        # what a source makes when it is asked is not held any longer than it must be
        held = isinstance(source, PreparedSource | StateDictSource | ConvertedSource)
        together: dict[tuple[torch.dtype, ...], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for job in self._rounds[number]:
            local = source.local(job.name, job.box)
            if job.shape is None:
                job.settle(source.holdings()[job.name][job.box].shape)
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

    def refill(self, source: WeightSource, number: int) -> None:
        """:meth:`fill` while other slots are on the wire; every copy has ended when this returns.

        On a GPU the copies have a stream of their own: they wait for no work of the trainer's, and
        none of it waits for them.  What the first fill read is there, so nothing need be awaited.
        """
        if self.slab.device.type != "cuda":
            self.fill(source, number)
            return
        with torch.cuda.device(self.slab.device):
            if self._aside is None:
                self._aside = torch.cuda.Stream()
            with torch.cuda.stream(self._aside):
                self.fill(source, number)
            self._aside.synchronize()

    @property
    def memory(self) -> list[LocalMemory]:
        """All that a transport registers."""
        return [self.slab.memory, *self._loan.memory]

    def pieces(self, ranges: Iterable[tuple[int, int]]) -> list[torch.Tensor]:
        """The bytes at each (offset, nbytes) of the plan."""
        return [self._piece(start, nbytes) for start, nbytes in ranges]

    def address(self, slot_offset: int) -> int:
        """Of the byte at an offset of the plan."""
        return self._piece(slot_offset, 1).data_ptr()

    def _piece(self, start: int, nbytes: int) -> torch.Tensor:
        lent = self._loan.piece(start, nbytes)
        return self.slab.data[start : start + nbytes] if lent is None else lent

    def moved(self, source: WeightSource) -> set[str]:
        """See :meth:`weightsync_client.lending.Loan.moved`."""
        return self._loan.moved(source)

    def non_finite(
        self, source: WeightSource, number: int
    ) -> dict[tuple[str, int], dict[str, object]]:
        """What is wrong with each tensor and box of a round that has a NaN or an infinity."""
        bad: dict[tuple[str, int], dict[str, object]] = {}
        slots: dict[tuple[str, int], tuple[torch.Tensor, ...]] = {}
        if number == 0:
            slots.update(dict.fromkeys(self._loan.lent, ()))
        slots |= {(job.name, job.box): job.slots for job in self._rounds[number]}
        for (name, box), copies in slots.items():
            local = source.local(name, box).detach()
            count = _count_nonfinite(local) if local.is_floating_point() else 0
            what = "values are NaN or infinite"
            if not count:
                count = max((_count_nonfinite(slot) for slot in copies), default=0)
                what = f"values are out of the range of {dtype_names(copies)}"
            if count:
                bad[name, box] = {
                    "tensor": name, "count": count, "numel": local.numel(), "what": what,
                }  # fmt: skip
        return bad

    def close(self) -> None:
        """Drop all views and free the slab.  No write may be in flight."""
        self._rounds.clear()
        self._loan.close()
        self.slab.close()


def refuse_non_finite(bad: Sequence[Mapping[str, object]]) -> None:
    """Raise what :meth:`Slots.non_finite` found.

    Raises:
        NonFiniteError: Names every tensor with a NaN or an infinity, and counts them.
    """
    if not bad:
        return
    first = bad[0]
    more = f", and {len(bad) - 1} more tensors" if len(bad) > 1 else ""
    raise NonFiniteError(
        f"{first['tensor']!r}: {first['count']} of {first['numel']} {first['what']}{more}",
        hint="nothing was sent; look at the loss and the gradients of the last steps "
        "(Publisher(check_finite=False) sends such weights)",
        tensors=list(bad),
    )


def torch_dtype(name: str) -> torch.dtype:
    """``torch.bfloat16`` for ``bfloat16``."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def dtype_names(tensors: Iterable[torch.Tensor]) -> str:
    """The dtypes of some tensors, each once."""
    return ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors}))


def _elems(nbytes: int, dtype: torch.dtype, name: str) -> int:
    offset, rest = divmod(nbytes, dtype.itemsize)
    if rest:
        raise InputError(f"slot of {name!r} at byte {nbytes} is not aligned for {dtype}")
    return offset


def _count_nonfinite(values: torch.Tensor) -> int:
    if not values.is_floating_point():
        return 0
    flat = values.reshape(-1)
    wide = flat.to(torch.float32) if flat.dtype.itemsize == 1 else flat
    return int(wide.numel() - torch.isfinite(wide).sum().item())
