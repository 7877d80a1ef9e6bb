"""Checkpoint names and shapes of a Hugging Face model, as views of its own parameters.

transformers 5 keeps some weights in another layout than checkpoints do (all experts of a layer
in one tensor) and converts when it saves.  That conversion is run once on meta tensors: whatever
it only slices, splits or transposes is found again as a strided view of a parameter, so a push
copies nothing for it, and a rank that holds a part of the parameter knows which parts of which
checkpoint tensors those are.  What it computes is converted anew in every push.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from weightsync.errors import InputError
from weightsync.geometry import Box
from weightsync_client.held import Held, hold, is_dtensor

logger = logging.getLogger(__name__)
aten = torch.ops.aten


class View(NamedTuple):
    """A checkpoint tensor as elements of a parameter, counted from the parameter's first."""

    parameter: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def of(self, name: str, held: Held, strides: tuple[int, ...]) -> Held:
        """What this rank holds of the checkpoint tensor, as views of its parts of the parameter.

        Args:
            name: Of the checkpoint tensor, for messages.
            held: What the rank holds of the parameter.
            strides: Of the whole parameter.

        Raises:
            InputError: The parameter is sharded, and its parts are no boxes of this tensor.
        """
        if [box for box, _ in held.pieces] == [Box.whole(held.shape)]:
            (base,) = (values for _, values in held.pieces)
            if base.stride() == strides:
                values = base.as_strided(
                    self.shape, self.strides, base.storage_offset() + self.offset
                )
                return Held(self.shape, held.dtype, ((Box.whole(self.shape), values),))
        axes = self._axes(name, held.shape, strides)
        parts = (_cut(axes, self.shape, box, values) for box, values in held.pieces)
        return Held(self.shape, held.dtype, tuple(part for part in parts if part is not None))

    def _axes(
        self, name: str, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> tuple[_Axis, ...]:
        """How every dim of the parameter is read."""
        starts, rest = [0] * len(shape), self.offset
        for dim in sorted(range(len(shape)), key=lambda d: -strides[d]):
            if shape[dim] > 1:
                starts[dim], rest = divmod(rest, strides[dim])
        axes = [_Axis(start) for start in starts]
        for dim, (n, stride) in enumerate(zip(self.shape, self.strides, strict=True)):
            if n == 1:
                continue
            found = [
                k
                for k, axis in enumerate(axes)
                if axis.dim is None
                and stride
                and strides[k]
                and stride % strides[k] == 0
                and axis.start + (n - 1) * (stride // strides[k]) < shape[k]
            ]
            if rest or not found:
                raise InputError(
                    f"{name!r} is part of {self.parameter!r}, which is sharded, and this rank's "
                    f"part is no box of it (shape {list(self.shape)}, strides "
                    f"{list(self.strides)} in {list(shape)})",
                    hint="shard that parameter along another dim, or push a state dict of "
                    "checkpoint tensors",
                    tensor=name,
                )
            k = max(found, key=lambda k: strides[k])
            axes[k] = _Axis(starts[k], dim, stride // strides[k])
        return tuple(axes)


class _Axis(NamedTuple):
    """A dim of a parameter: index ``i`` of the view's ``dim`` reads ``start + i * step``."""

    start: int
    dim: int | None = None
    step: int = 1


def _cut(
    axes: Sequence[_Axis], shape: tuple[int, ...], box: Box, values: torch.Tensor
) -> tuple[Box, torch.Tensor] | None:
    """The part of a view that lies in one box of the parameter; None: nothing does."""
    lo, hi = [0] * len(shape), list(shape)
    kept: list[int] = []
    for at, axis in enumerate(axes):
        first, stop = box.lo[at] - axis.start, box.hi[at] - axis.start
        if axis.dim is None:
            if not first <= 0 < stop:
                return None
            values = values.select(len(kept), -first)
            continue
        lo[axis.dim] = max(0, -(-first // axis.step))
        hi[axis.dim] = min(shape[axis.dim], -(-stop // axis.step))
        if lo[axis.dim] >= hi[axis.dim]:
            return None
        index = axis.start + lo[axis.dim] * axis.step - box.lo[at]
        end = axis.start + (hi[axis.dim] - 1) * axis.step - box.lo[at] + 1
        values = values[(slice(None),) * len(kept) + (slice(index, end, axis.step),)]
        kept.append(axis.dim)
    values = values.permute([kept.index(dim) for dim in sorted(kept)])
    for dim in range(len(shape)):
        if dim not in kept:
            values = values.unsqueeze(dim)
    return Box(tuple(lo), tuple(hi)), values


class _KeepViews(TorchDispatchMode):
    """Lets copies that only make a view contiguous be that view, so that it can be found again."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket is aten.clone:
            return aten.alias(args[0])
        return func(*args, **kwargs)


class HfConversion:
    """How one model's state dict becomes checkpoint tensors.

    Args:
        model: A ``transformers.PreTrainedModel``.
        tensors: Its state dict; only names, shapes and strides are looked at.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        self._form = _form(tensors)
        self._views: dict[str, View] | None = None
        metas = {
            name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
            for name, t in tensors.items()
        }
        owner = {t.untyped_storage()._cdata: name for name, t in metas.items()}
        try:
            with torch.no_grad(), _KeepViews():  # type: ignore[no-untyped-call]
                made = _convert(model, metas)
        except RuntimeError as error:
            # an operation that needs a contiguous input met a view
            logger.info("the checkpoint conversion is run in every push: %s", error)
            return
        views = {}
        for name, t in made.items():
            parameter = owner.get(t.untyped_storage()._cdata)
            if parameter is None:
                logger.info("%s is computed by the checkpoint conversion, in every push", name)
                return
            views[name] = View(parameter, tuple(t.shape), t.stride(), int(t.storage_offset()))
        self._views = views

    def fits(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether this conversion was made for a state dict of that form."""
        return self._form == _form(tensors)

    def apply(self, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, Held]:
        """What this rank holds of the checkpoint tensors: views where it can be, else computed.

        Raises:
            InputError: Sharded parameters that the conversion would compute with, or whose parts
                are no boxes of checkpoint tensors.
        """
        if self._views is not None:
            held = {name: hold(name, t) for name, t in tensors.items()}
            return {
                name: view.of(name, held[view.parameter], self._form[view.parameter].strides)
                for name, view in self._views.items()
            }
        sharded = [name for name, t in tensors.items() if is_dtensor(t)]
        if sharded:
            raise InputError(
                f"the checkpoint conversion of {type(model).__name__} computes new tensors, and "
                f"{sharded[0]!r} is sharded",
                hint="push a mapping of checkpoint names to tensors, in the checkpoint's shapes",
                tensor=sharded[0],
            )
        with torch.no_grad():
            return {name: hold(name, t) for name, t in _convert(model, tensors).items()}


_conversions: weakref.WeakKeyDictionary[nn.Module, HfConversion] = weakref.WeakKeyDictionary()


def checkpoint_tensors(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, Held]:
    """What ``save_pretrained`` would write for this state dict; the same tensors for other models.

    The conversion is looked at once a model, and again when a parameter has changed its form.
    """
    if not converts(model):
        return {name: hold(name, tensor) for name, tensor in tensors.items()}
    conversion = _conversions.get(model)
    if conversion is None or not conversion.fits(tensors):
        conversion = _conversions[model] = HfConversion(model, tensors)
    return conversion.apply(model, tensors)


def converts(model: nn.Module) -> bool:
    """Whether this is a transformers model of a version that converts when it saves."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return False
    try:
        from transformers.core_model_loading import revert_weight_conversion  # noqa: F401
    except ImportError:
        return False  # transformers 4: modules are laid out as checkpoints are
    return True


def _convert(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    made: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(tensors))
    return made


class _Form(NamedTuple):
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


def _form(tensors: Mapping[str, torch.Tensor]) -> dict[str, _Form]:
    """Of whole tensors: a DTensor's shape and strides are those of all its shards together."""
    return {name: _Form(tuple(t.shape), t.stride(), t.dtype) for name, t in tensors.items()}
