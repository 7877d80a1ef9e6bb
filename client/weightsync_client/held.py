"""One rank's part of a tensor, whatever kind of tensor it is: boxes and their values."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from typing_extensions import TypeIs

from weightsync.dtypes import ITEMSIZE
from weightsync.errors import InputError, ManifestError
from weightsync.geometry import Box
from weightsync_client.sharding import Cut, local_boxes

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement


@dataclass(frozen=True, slots=True)
class LocalShard:
    """A box of a larger tensor, for trainers that shard without DTensor.

    Args:
        tensor: This rank's values.
        shape: Shape of the whole tensor.
        offset: Where the first of them lies in it.
    """

    tensor: torch.Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Held:
    """What this rank holds of a tensor.

    Attributes:
        shape: Of the whole tensor.
        dtype: Of its values here.
        pieces: Disjoint boxes with elements, each with its values in the box's shape.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[tuple[Box, torch.Tensor], ...]

    @property
    def memory(self) -> tuple[object, ...]:
        """Equal for two tensors that are the same memory seen the same way; empty: not known."""
        if not any(values.numel() for _, values in self.pieces):
            return ()
        return (
            self.shape,
            *(
                (box, values.device, values.data_ptr(), values.dtype, values.stride())
                for box, values in self.pieces
            ),
        )


def is_dtensor(tensor: object) -> TypeIs[DTensor]:
    """Whether it is a DTensor.  Their module takes seconds to import, and is there if one is."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def hold(name: str, tensor: object) -> Held:
    """What this rank holds of ``tensor``; no copy.

    A plain tensor is held whole.

    Raises:
        InputError: No dense tensor, or one whose placements do not say which values it has.
        ManifestError: An element type that does not travel.
    """
    if is_dtensor(tensor):
        return _hold_dtensor(name, tensor)
    if isinstance(tensor, LocalShard):
        values = _checked(name, tensor.tensor)
        hi = tuple(a + n for a, n in zip(tensor.offset, values.shape, strict=False))
        box, shape = Box(tuple(tensor.offset), hi), tuple(tensor.shape)
        if len(tensor.offset) != values.ndim or not box.fits(shape):
            raise InputError(
                f"{name!r}: a shard of shape {list(values.shape)} at {list(tensor.offset)} is no "
                f"part of {list(shape)}",
                hint="offset and shape count elements of the whole tensor, one number a dim",
                tensor=name,
            )
        return Held(shape, values.dtype, ((box, values),) if values.numel() else ())
    values = _checked(name, tensor)
    shape = tuple(values.shape)
    return Held(shape, values.dtype, ((Box.whole(shape), values),))


def _hold_dtensor(name: str, tensor: DTensor) -> Held:
    mesh, shape = tensor.device_mesh, tuple(tensor.shape)
    coordinate = mesh.get_coordinate()
    if coordinate is None:  # this rank is in another part of the job
        return Held(shape, tensor.dtype, ())
    cuts = [
        cut
        for axis, placement in enumerate(tensor.placements)
        if (cut := _cut(name, placement, len(shape), mesh.size(axis), coordinate[axis]))
    ]
    values = _checked(name, tensor.to_local())
    pieces = []
    for box, local in local_boxes(shape, cuts, tuple(values.shape), name=name):
        part = values
        for dim, (lo, n) in enumerate(zip(local.lo, local.shape, strict=True)):
            part = part.narrow(dim, lo, n)
        pieces.append((box, part))
    return Held(shape, values.dtype, tuple(pieces))


def _cut(name: str, placement: Placement, ndim: int, parts: int, index: int) -> Cut | None:
    from torch.distributed.tensor import Partial, Replicate, Shard

    if isinstance(placement, Replicate):
        return None
    if isinstance(placement, Partial):
        raise InputError(
            f"{name!r} has placement {placement}: each rank holds a summand, not values",
            hint="reduce it first: tensor.redistribute(placements=[Replicate(), ...])",
            tensor=name,
        )
    # FSDP2's strided shard is no public name; it alone has a split factor
    strided = getattr(placement, "split_factor", None)
    if strided is None and type(placement) is not Shard:
        raise InputError(
            f"{name!r} has placement {placement}, of a kind that is not known",
            hint="redistribute it to Shard or Replicate, or push LocalShards",
            tensor=name,
        )
    dim = int(getattr(placement, "dim"))  # noqa: B009 - both kinds have it, Placement has not
    return Cut(dim + ndim if dim < 0 else dim, parts, index, int(strided or 0))


def _checked(name: str, tensor: object) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor):
        raise InputError(
            f"{name!r} is a {type(tensor).__name__}, not a tensor",
            hint="push a mapping without it: {k: v for k, v in model.state_dict().items() if ...}",
            tensor=name,
        )
    # Any other subclass (quantised, say) need not hold what its shape says; reading its memory
    # would send packed values as if they were the tensor.
    if type(tensor) not in {torch.Tensor, nn.Parameter, nn.Buffer}:
        raise InputError(
            f"{name!r} is a {type(tensor).__name__}, and its memory is not the whole tensor",
            hint="gather it to a plain tensor first, or write a WeightSource for it",
            tensor=name,
        )
    if tensor.device.type == "meta" or tensor.layout != torch.strided:
        raise InputError(
            f"{name!r} has no dense values (device {tensor.device}, layout {tensor.layout})",
            hint="load the model, or make the tensor dense, before the push",
            tensor=name,
        )
    if str(tensor.dtype).removeprefix("torch.") not in ITEMSIZE:
        raise ManifestError(
            f"{name!r} has dtype {tensor.dtype}, which does not travel",
            hint=f"cast it to one of {', '.join(ITEMSIZE)}",
            tensor=name,
        )
    # a lazily conjugated or negated view: its memory holds other values than it shows
    return tensor.detach().resolve_conj().resolve_neg()
