"""Make kernel tensors from load format with the engine's own post-processing.

A *finished copy* of a module is what a fresh load would have made of it: a shallow copy of the
twin's module, which was never post-processed, gets parameters in load format and goes through the
engine's ``finish``.  The live module is not touched.  ``transplant`` then moves the result into
the live module, in place wherever a tensor can be kept, so that captured CUDA graphs stay valid.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import nn

from weightsync.errors import LayoutError
from weightsync_server.engines.base import EngineAdapter

_SCALARS = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Changes:
    """What post-processing did to a module.

    Attributes:
        params: Parameters and buffers that are other objects, or have another form, than before.
        tensors: Attributes that are tensors and were set.
        objects: Attributes that are neither tensors nor plain values and were set.
        hidden: Tensors that the quantisation method keeps and the module does not own.
    """

    params: frozenset[str]
    tensors: frozenset[str]
    objects: frozenset[str]
    hidden: frozenset[str]

    @property
    def none(self) -> bool:
        """Whether the module is as it was loaded."""
        return not (self.params or self.tensors or self.objects or self.hidden)


def _shallow(module: Any) -> Any:
    twin = copy.copy(module)
    for slot in ("_parameters", "_buffers", "_modules"):
        if slot in twin.__dict__:
            twin.__dict__[slot] = dict(twin.__dict__[slot])
    return twin


def _named(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of this module alone."""
    own = {**module._parameters, **module._buffers}  # noqa: SLF001 - nn.Module has no other door
    return {name: t for name, t in own.items() if t is not None}


def _plain(module: nn.Module) -> dict[str, Any]:
    return {
        k: v for k, v in module.__dict__.items() if k not in {"_parameters", "_buffers", "_modules"}
    }


def as_parameter(like: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    """``data`` as a parameter of the class of ``like``, with its loader attributes."""
    made = torch.Tensor._make_subclass(type(like), data, False)  # noqa: SLF001
    made.__dict__.update(like.__dict__)
    return made


def loaded_copy(twin: nn.Module, tensors: Mapping[str, torch.Tensor], live: nn.Module) -> nn.Module:
    """A shallow copy of a twin's module, its parameters ``tensors`` in load format.

    What else is on the meta device (buffers, tables that are no weights) is taken from ``live``.
    """
    made: nn.Module = _shallow(twin)
    method = getattr(twin, "quant_method", None)
    if method is not None:
        setattr(made, "quant_method", _shallow(method))  # noqa: B010 - nn.Module's own setattr
    for store, own in ((made._parameters, "_parameters"), (made._buffers, "_buffers")):  # noqa: SLF001
        for name, t in list(store.items()):
            if t is None:
                continue
            if name in tensors:
                store[name] = as_parameter(t, tensors[name])  # type: ignore[assignment]
            elif t.is_meta and name in getattr(live, own):
                store[name] = getattr(live, own)[name]
    for name, value in _plain(made).items():
        if isinstance(value, torch.Tensor) and value.is_meta and name in live.__dict__:
            made.__dict__[name] = live.__dict__[name]
    return made


def _reachable(value: Any, depth: int) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and isinstance(value, (list, tuple)):
        for item in value:
            yield from _reachable(item, depth - 1)
    elif depth and isinstance(value, dict):
        for item in value.values():
            yield from _reachable(item, depth - 1)
    elif depth and is_dataclass(value):
        for f in fields(value):
            yield from _reachable(getattr(value, f.name, None), depth - 1)
    elif depth and hasattr(value, "__dict__") and not isinstance(value, type):
        for item in vars(value).values():
            yield from _reachable(item, depth - 1)


def _same_form(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()


def changes(loaded: nn.Module, finished: nn.Module) -> Changes:
    """Compare a loaded copy with itself after ``finish`` (two shallow copies of one origin)."""
    before, after = _named(loaded), _named(finished)
    params = {
        name
        for name in before.keys() | after.keys()
        if name not in before
        or name not in after
        or not _same_form(before[name], after[name])
        or before[name].data_ptr() != after[name].data_ptr()
    }
    old, new = _plain(loaded), _plain(finished)
    fresh = {k: v for k, v in new.items() if k not in old or old[k] is not v}
    fresh.pop("quant_method", None)
    tensors = {k for k, v in fresh.items() if isinstance(v, torch.Tensor)}
    objects = {k for k, v in fresh.items() if k not in tensors and not isinstance(v, _SCALARS)}
    own = {t.untyped_storage().data_ptr() for t in after.values() if t.numel()}
    hidden: set[str] = set()
    m_old, m_new = getattr(loaded, "quant_method", None), getattr(finished, "quant_method", None)
    if m_old is not None and m_new is not None:
        for key, value in vars(m_new).items():
            if vars(m_old).get(key) is value:
                continue
            if any(
                t.numel() > 1 and not t.is_meta and t.untyped_storage().data_ptr() not in own
                for t in _reachable(value, 4)
            ):
                hidden.add(key)
    return Changes(frozenset(params), frozenset(tensors), frozenset(objects), frozenset(hidden))


def finished_copy(
    adapter: EngineAdapter, twin: nn.Module, tensors: Mapping[str, torch.Tensor], live: nn.Module
) -> tuple[nn.Module, Changes]:
    """A loaded copy after the engine's post-processing, and what that changed."""
    loaded = loaded_copy(twin, tensors, live)
    finished: nn.Module = _shallow(loaded)
    method = getattr(loaded, "quant_method", None)
    if method is not None:
        setattr(finished, "quant_method", _shallow(method))  # noqa: B010
    adapter.finish(finished)
    return finished, changes(loaded, finished)


def obstacle(live: nn.Module, finished: nn.Module, made: Changes, *, replaceable: bool) -> str:
    """Why the result could not be transplanted; empty where it can be."""
    if made.hidden:
        return (
            "its quantisation method keeps tensors of its own "
            f"({', '.join(sorted(made.hidden))}) that cannot be renewed in place"
        )
    if replaceable:
        return ""
    if made.objects:
        return f"post-processing sets {', '.join(sorted(made.objects))}, which captured graphs keep"
    own, new = _named(live), _named(finished)
    for name in made.params:
        if name in own and name in new and not _same_form(own[name], new[name]):
            return (
                f"{name} is {new[name].dtype} {tuple(new[name].shape)} after post-processing and "
                f"{own[name].dtype} {tuple(own[name].shape)} in the live engine"
            )
    return ""


def transplant(live: nn.Module, finished: nn.Module, made: Changes, *, replaceable: bool) -> None:
    """Move a finished copy's result into the live module.

    The engine is paused.  Tensors of the same form are copied in place; on engines without
    captured graphs others are replaced.

    Raises:
        LayoutError: See :func:`obstacle`; nothing was changed.
    """
    reason = obstacle(live, finished, made, replaceable=replaceable)
    if reason:
        raise LayoutError(f"a finished module cannot be put into the live engine: {reason}")
    own = _named(live)
    for name, new in _named(finished).items():
        old = own.get(name)
        if old is not None and _same_form(old, new):
            if new.numel() and old.data_ptr() != new.data_ptr():
                old.data.copy_(new.data)
        elif name in finished._parameters:  # noqa: SLF001
            live._parameters[name] = new  # type: ignore[assignment]  # noqa: SLF001
        else:
            live._buffers[name] = new  # noqa: SLF001
    for name in made.tensors:
        old, new = live.__dict__.get(name), finished.__dict__[name]
        if isinstance(old, torch.Tensor) and _same_form(old, new):
            old.copy_(new)
        else:
            live.__dict__[name] = new
    for name in made.objects:
        live.__dict__[name] = finished.__dict__[name]


def materialise(twin: nn.Module, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Give every meta parameter and buffer of a twin memory; shared ones stay shared."""
    made: dict[int, torch.Tensor] = {}
    for module in twin.modules():
        for store in (module._parameters, module._buffers):  # noqa: SLF001
            for name, t in store.items():
                if t is None or not t.is_meta:
                    continue
                key = int(t.untyped_storage()._cdata)  # noqa: SLF001
                if key not in made:
                    made[key] = as_parameter(t, make(t))
                store[name] = made[key]  # type: ignore[assignment]
