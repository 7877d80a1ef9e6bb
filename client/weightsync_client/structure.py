"""What is the same in every push of a model: its checkpoint tensors, and where each lies in it.

Making a source out of a model costs tens of microseconds a tensor: conversions, boxes, aliases.
Where a model's tensors have the form that they had, only their addresses are new.  Nothing here
keeps a tensor alive: a trainer may move its weights away between two pushes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from weightsync.geometry import Box
from weightsync.manifest import TensorSpec
from weightsync_client.converted import ConvertedSource
from weightsync_client.declaration import Declaration
from weightsync_client.held import LocalShard, is_dtensor
from weightsync_client.modules import take_apart
from weightsync_client.quantization import QuantizationSpec
from weightsync_client.quantized_form import QuantizedForm
from weightsync_client.source import StateDictSource, Weights, WeightSource, unwrapped

_PLAIN = {torch.Tensor, nn.Parameter, nn.Buffer}
_PLAIN_OR_NONE = {*_PLAIN, type(None)}


class _View(NamedTuple):
    """A box's values as elements of one of the tensors; ``offset`` from that tensor's first.

    ``whole``: they are that tensor.
    """

    whole: bool
    base: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


@dataclass(frozen=True, eq=False)
class Structure:
    """The form of one model, and what was made of it.

    Attributes:
        model: The module; None: a mapping.
        form: Of its tensors, but for their addresses.
        at: Their addresses when they were looked at first.
        sharing: Which of them are parts of one memory, see :func:`_sharing`.
        declaration: What the source declared.
        holdings: Its boxes.
        views: Where they lie, by name and box.
    """

    model: weakref.ref[nn.Module] | None
    form: list[object]
    at: tuple[int, ...]
    sharing: list[int]
    declaration: Declaration
    holdings: Mapping[str, tuple[Box, ...]]
    views: Mapping[str, tuple[_View, ...]]

    def whole(self, name: str, box_index: int) -> int | None:
        """The number of the model's tensor that is this box; None: the box is but a part of one."""
        view = self.views[name][box_index]
        return view.base if view.whole else None


class PreparedSource:
    """A model whose structure is known, with the addresses of this push.

    Attributes:
        mark: Equal for two pushes of the same structure from the same memory.
        structure: What is known.
        declaration: What was declared when it was looked at.
    """

    def __init__(
        self, structure: Structure, bases: Sequence[torch.Tensor], at: tuple[int, ...]
    ) -> None:
        self.mark = (structure, at)
        self.declaration = structure.declaration
        self.structure = structure
        self._bases = bases

    def manifest(self) -> Iterable[TensorSpec]:
        """See :class:`weightsync_client.source.WeightSource`."""
        return self.structure.declaration.tensors

    def holdings(self) -> Mapping[str, tuple[Box, ...]]:
        """See :class:`weightsync_client.source.WeightSource`."""
        return self.structure.holdings

    def local(self, name: str, box_index: int) -> torch.Tensor:
        """The values of one box: a view."""
        view = self.structure.views[name][box_index]
        base = self._bases[view.base]
        if base.requires_grad:
            base = base.detach()
        if view.whole:
            return base
        return base.as_strided(view.shape, view.strides, base.storage_offset() + view.offset)

    def tensors(self, numbers: Iterable[int]) -> list[torch.Tensor]:
        """Of the model's own, those of these numbers; with gradients."""
        return [self._bases[k] for k in numbers]


class Structures:
    """The structure that was pushed last, and what of it is quantised."""

    def __init__(self) -> None:
        self._known: Structure | None = None
        self._quantized: tuple[Structure, QuantizationSpec, QuantizedForm] | None = None

    def forget(self) -> None:
        """The next model is looked at."""
        self._known = None

    def prepared(self, model: Weights) -> PreparedSource | None:
        """A source for a model of the known structure; None: it has to be looked at."""
        known = self._known
        if known is None or (known.model is not None and known.model() is not model):
            return None
        found = _look(model)
        if found is None or found.form != known.form or (known.model is None) != found.mapping:
            return None
        # tensors of the same form at the same addresses share what they shared
        if found.at != known.at and _sharing(found.bases) != known.sharing:
            return None
        return PreparedSource(known, found.bases, found.at)

    def quantized(self, source: WeightSource, spec: QuantizationSpec) -> QuantizedForm:
        """What of a source is quantised; of a known structure that is known, too.

        Raises:
            ManifestError: See :class:`weightsync_client.quantized_form.QuantizedForm`.
        """
        structure = source.structure if isinstance(source, PreparedSource) else None
        if self._quantized is not None and self._quantized[:2] == (structure, spec):
            return self._quantized[2]
        made = QuantizedForm(source.manifest(), source.holdings(), spec)
        self._quantized = None if structure is None else (structure, spec, made)
        return made

    def learn(self, model: Weights, source: WeightSource, declaration: Declaration) -> None:
        """Keep what was made of a model, if all of it are views of the model's tensors."""
        self._known = None
        found = _look(model)
        if found is None or not isinstance(source, StateDictSource | ConvertedSource):
            return
        if any(base.is_neg() for base in found.bases):
            return  # the memory has not the values
        by_storage = {_storage(base): k for k, base in enumerate(found.bases)}
        holdings = source.holdings()
        views: dict[str, tuple[_View, ...]] = {}
        for name, boxes in holdings.items():
            made = []
            for box in range(len(boxes)):
                values = source.local(name, box)
                k = by_storage.get(_storage(values))
                if k is None or values.dtype != found.bases[k].dtype or not values.numel():
                    return  # computed, or nothing to find it by
                base = found.bases[k]
                offset = int(values.storage_offset() - base.storage_offset())
                form = tuple(values.shape), values.stride(), offset
                whole = form == (tuple(base.shape), base.stride(), 0)
                made.append(_View(whole, k, *form))
            views[name] = tuple(made)
        ref = weakref.ref(model) if isinstance(model, nn.Module) else None
        self._known = Structure(
            ref, found.form, found.at, _sharing(found.bases), declaration, dict(holdings), views
        )


class _Found(NamedTuple):
    mapping: bool
    bases: list[torch.Tensor]
    form: list[object]
    at: tuple[int, ...]


def _look(model: Weights) -> _Found | None:
    """A model's own tensors; None: they cannot be looked at twice, or are of unknown kinds."""
    form: list[object] = []
    tensors: list[Any] = []
    if isinstance(model, nn.Module):
        module = unwrapped(model)
        if not take_apart(module, form, tensors):
            state = module.state_dict(keep_vars=True)
            form, tensors = [*state], [*state.values()]
    elif isinstance(model, dict):
        form, tensors = [*model], [*model.values()]
    else:
        return None
    kinds = [*map(type, tensors)]
    form += kinds
    bases = [tensor for tensor in tensors if tensor is not None]
    if not _PLAIN_OR_NONE.issuperset(kinds):
        with torch.no_grad():
            parts = [_part(tensor) for tensor in bases]
        bases = [base for base, _ in parts]
        form += [part for _, part in parts]
        if not all(type(base) in _PLAIN for base in bases):
            return None
    for base in bases:
        form += (
            base.dtype, base.shape, base.stride(), base.storage_offset(), base.device,
            base.is_neg(),
        )  # fmt: skip
    at = tuple([base.data_ptr() for base in bases])
    return _Found(not isinstance(model, nn.Module), bases, form, at)


def _sharing(bases: Sequence[torch.Tensor]) -> list[int]:
    """The first of the tensors in the memory of each: tied ones are one, and parts of one."""
    first: dict[int, int] = {}
    return [first.setdefault(_storage(base), k) for k, base in enumerate(bases)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _part(tensor: Any) -> tuple[Any, object]:
    """What this rank has of a tensor, and which part of the whole that is."""
    if type(tensor) in _PLAIN:
        return tensor, None
    if isinstance(tensor, LocalShard):
        return tensor.tensor, (tensor.shape, tensor.offset)
    if is_dtensor(tensor):
        return tensor.to_local(), (tensor.shape, tensor.placements, tensor.device_mesh)
    return tensor, None
