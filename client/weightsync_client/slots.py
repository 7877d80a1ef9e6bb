"""Slots: registered bytes of a trainer rank, packed in destination order, ready to be written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from weightsync.errors import InputError, NonFiniteError
from weightsync.manifest import Manifest
from weightsync.plan import TransportPlan
from weightsync.slab import Slab
from weightsync.slots import Fill
from weightsync.transport.base import LocalMemory
from weightsync_client.filling import Job, Round
from weightsync_client.lending import Loan
from weightsync_client.source import WeightSource


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
        self._rounds = [Round(self._jobs(each.fills, manifest)) for each in plan.rounds]
        self._aside: torch.cuda.Stream | None = None

    def _jobs(self, fills: Iterable[Fill], manifest: Manifest) -> list[Job]:
        by_box: dict[tuple[str, int], list[Fill]] = {}
        for each in fills:
            by_box.setdefault((each.tensor, each.box), []).append(each)
        return [
            self._job(name, box, torch_dtype(manifest.by_name[name].dtype), of_box)
            for (name, box), of_box in by_box.items()
        ]

    def _job(self, name: str, box: int, made: torch.dtype, fills: Sequence[Fill]) -> Job:
        copies = []
        for f in fills:
            dtype = torch_dtype(f.dtype)
            typed = self.slab.data.view(dtype)
            # as_strided counts from the start of the storage; the slab begins some bytes later
            start = typed.storage_offset() + _elems(f.slot_offset, dtype, name)
            slot = typed.as_strided(f.shape, f.slot_strides, start)
            copies.append((slot, f.shape, f.src_strides, f.src_offset))
        return Job(name, box, made, copies)

    @torch.no_grad()
    def fill(self, source: WeightSource, number: int = 0) -> None:
        """Copy a round's values into its slots, rounded to the manifest's dtype, cast as wanted.

        No write from these slots may be in flight (WS-3).  On a GPU the copies are queued on the
        current stream.  The source's memory is looked up anew each time: a trainer may replace its
        tensors.

        Raises:
            InputError: A tensor has not the shape that the source declared.
        """
        self._rounds[number].fill(source)

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
        slots |= {(job.name, job.box): job.slots for job in self._rounds[number].jobs}
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
