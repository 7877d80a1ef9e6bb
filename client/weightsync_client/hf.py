"""Checkpoint names and shapes of a Hugging Face model, as views of its own parameters.

transformers 5 keeps some weights in another layout than checkpoints do (all experts of a layer
in one tensor) and converts when it saves.  That conversion is run once on meta tensors: whatever
it only slices, splits or transposes is found again as a strided view of a parameter, so a push
copies nothing for it.  What it computes is converted anew in every push.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

logger = logging.getLogger(__name__)
aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class _View:
    """Elements of a parameter's storage, relative to the parameter's first."""

    parameter: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def of(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        base = tensors[self.parameter]
        return base.as_strided(self.shape, self.strides, base.storage_offset() + self.offset)


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
        self._views: dict[str, _View] | None = None
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
            views[name] = _View(parameter, tuple(t.shape), t.stride(), int(t.storage_offset()))
        self._views = views

    def fits(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether this conversion was made for a state dict of that form."""
        return self._form == _form(tensors)

    def apply(
        self, model: nn.Module, tensors: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Checkpoint tensors of the state dict ``tensors``: views, or computed ones."""
        if self._views is None:
            with torch.no_grad():
                return _convert(model, tensors)
        return {name: view.of(tensors) for name, view in self._views.items()}


_conversions: weakref.WeakKeyDictionary[nn.Module, HfConversion] = weakref.WeakKeyDictionary()


def checkpoint_tensors(
    model: nn.Module, tensors: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """What ``save_pretrained`` would write for this state dict; the same tensors for other models.

    The conversion is looked at once a model, and again when a parameter has changed its form.
    """
    if not converts(model):
        return tensors
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


def _form(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[Any, ...]]:
    return {name: (tuple(t.shape), t.stride(), t.dtype) for name, t in tensors.items()}
