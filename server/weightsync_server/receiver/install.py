"""Make kernel tensors from load format with the engine's own post-processing.

A *finished copy* of a module is what a fresh load would have made of it: a shallow copy of the
twin's module, which was never post-processed, gets parameters in load format and goes through the
engine's ``finish``.  The live module is not touched.  ``transplant`` then moves the result into
the live module, in place wherever a tensor can be kept, so that captured CUDA graphs stay valid.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from weightsync.errors import LayoutError
from weightsync_server.engines.base import EngineAdapter
from weightsync_server.receiver.changes import SCALARS, SLOTS, Before, Changes, apart, attributes
from weightsync_server.receiver.kernel import key_of, own_tensors, same_form

#: what becomes of the tensors that a finished copy is made of
Given = Literal["copy", "share", "away"]


@dataclass(frozen=True)
class Finished:
    """A finished copy, which of its tensors were loaded, and what finishing changed."""

    module: nn.Module
    loaded: frozenset[str]
    changes: Changes

    def with_values(self, names: frozenset[str]) -> Finished:
        """The same, ``names`` counted among the changed values."""
        changed = replace(self.changes, values=self.changes.values | names)
        return replace(self, changes=changed)


def other_values(made: Finished, live: nn.Module, names: frozenset[str]) -> frozenset[str]:
    """Those of ``names`` that the live module has other values for.

    A value that depends on the weights may come out as it was before finishing.
    """
    mine, theirs = made.module.__dict__, live.__dict__
    return frozenset(k for k in names if (k in mine, mine.get(k)) != (k in theirs, theirs.get(k)))


def varying(a: Finished, b: Finished) -> frozenset[str]:
    """Plain values that differ between two finished copies of one module."""
    mine, theirs = a.module.__dict__, b.module.__dict__
    return frozenset(
        k
        for k in mine.keys() | theirs.keys()
        if isinstance(mine.get(k), SCALARS)
        and isinstance(theirs.get(k), SCALARS)
        and (k in mine, mine.get(k)) != (k in theirs, theirs.get(k))
    )


def _shallow(module: Any) -> Any:
    twin = copy.copy(module)
    for slot in SLOTS & twin.__dict__.keys():
        twin.__dict__[slot] = dict(twin.__dict__[slot])
    return twin


def as_parameter(like: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    """``data`` as a parameter of the class of ``like``, with its loader attributes."""
    made = torch.Tensor._make_subclass(type(like), data, False)  # noqa: SLF001
    made.__dict__.update(like.__dict__)
    return made


def loaded_copy(twin: nn.Module, tensors: Mapping[str, torch.Tensor], live: nn.Module) -> nn.Module:
    """A shallow copy of a twin's module, its parameters ``tensors`` in load format.

    What else is on the meta device (buffers, tables that are no weights) is copied from ``live``:
    post-processing may write to it.
    """
    made: nn.Module = _shallow(twin)
    method = getattr(twin, "quant_method", None)
    if method is not None:
        made.__dict__["quant_method"] = _shallow(method)
    for store, own in ((made._parameters, live._parameters), (made._buffers, live._buffers)):  # noqa: SLF001
        for name, t in list(store.items()):
            source = own.get(name) if _on_meta(t) else t
            if name in tensors and t is not None:
                store[name] = as_parameter(t, tensors[name])  # type: ignore[assignment]
            elif t is not None and source is not None:
                store[name] = as_parameter(t, apart(source))  # type: ignore[assignment]
    for name, value in attributes(made).items():
        source = live.__dict__.get(name) if _on_meta(value) else value
        if isinstance(source, torch.Tensor):
            made.__dict__[name] = apart(source)
    return made


def _on_meta(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta


def finished_copy(
    adapter: EngineAdapter,
    twin: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    live: nn.Module,
    *,
    given: Given = "copy",
) -> Finished:
    """A loaded copy after the engine's post-processing, and what that changed.

    Args:
        adapter: The engine.
        twin: The module in load format, never finished; it stays so.
        tensors: Its parameters in load format, by the module's own names.
        live: The module that serves.
        given: ``copy``: the copy gets copies of ``tensors``: what finishing does to them, or
            refers to, must not be there when the next push writes to ``tensors`` (WS-1).
            ``share``: it keeps ``tensors``, live memory that finishing is known to leave alone.
            ``away``: ``tensors`` are nobody else's; finishing may write to them, and only here
            such writes are looked for.
    """
    own = {name: t.clone() for name, t in tensors.items()} if given == "copy" else tensors
    loaded = loaded_copy(twin, own, live)
    before = Before(loaded, unwatched=() if given == "away" else tensors.keys())
    finished: nn.Module = _shallow(loaded)
    method = getattr(loaded, "quant_method", None)
    if method is not None:
        finished.__dict__["quant_method"] = _shallow(method)
    adapter.finish(finished)
    return Finished(finished, frozenset(tensors), before.changes(finished, live))


def obstacle(live: nn.Module, made: Finished, *, replaceable: bool) -> str:
    """Why the result could not be transplanted; empty where it can be."""
    changed, own, new = made.changes, own_tensors(live), own_tensors(made.module)
    if changed.hidden:
        return (
            f"post-processing changes {', '.join(sorted(changed.hidden))}, "
            "which cannot be renewed in place"
        )
    if replaceable:
        return ""
    if changed.objects or changed.values:
        return (
            f"post-processing sets {', '.join(sorted(changed.objects | changed.values))}, "
            "which captured graphs keep"
        )
    now = {n: (own.get(n), new.get(n)) for n in sorted(made.loaded | changed.params)}
    for name in sorted(changed.tensors):
        held = live.__dict__.get(name)
        now[name] = (held if isinstance(held, torch.Tensor) else None, made.module.__dict__[name])
    for name, (theirs, ours) in now.items():
        if ours is not None and (theirs is None or not same_form(theirs, ours)):
            return (
                f"{name} is {_form(ours)} after post-processing and {_form(theirs)} in the live "
                "engine, which captured graphs keep"
            )
    return ""


def _form(t: torch.Tensor | None) -> str:
    return "absent" if t is None else f"{t.dtype} {tuple(t.shape)}, strides {t.stride()}"


@torch.no_grad()
def transplant(live: nn.Module, made: Finished, *, replaceable: bool) -> None:
    """Move a finished copy's result into the live module.

    The engine is paused.  Tensors of the same form are copied in place; on engines without
    captured graphs others are replaced.

    Raises:
        LayoutError: See :func:`obstacle`; nothing was changed.
    """
    reason = obstacle(live, made, replaceable=replaceable)
    if reason:
        raise LayoutError(
            f"a finished module cannot be put into the live engine: {reason}",
            hint="restart the engine with the new checkpoint",
        )
    own, finished, changed = own_tensors(live), made.module, made.changes
    for name, new in own_tensors(finished).items():
        old = own.get(name)
        if name not in made.loaded | changed.params:
            continue
        if old is not None and same_form(old, new):
            if new.numel() and old.data_ptr() != new.data_ptr():
                old.data.copy_(new.data)
        elif name in finished._parameters:  # noqa: SLF001
            live._parameters[name] = new  # type: ignore[assignment]  # noqa: SLF001
        else:
            live._buffers[name] = new  # noqa: SLF001
    for name in changed.tensors:
        old, new = live.__dict__.get(name), finished.__dict__[name]
        if isinstance(old, torch.Tensor) and same_form(old, new):
            old.data.copy_(new.data)
        else:
            live.__dict__[name] = new
    for name in changed.objects | changed.values:
        if name in finished.__dict__:
            live.__dict__[name] = finished.__dict__[name]
        else:
            live.__dict__.pop(name, None)


def materialise(twin: nn.Module, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Give every meta parameter and buffer of a twin memory; shared ones stay shared."""
    made: dict[int, torch.Tensor] = {}
    for module in twin.modules():
        for store in (module._parameters, module._buffers):  # noqa: SLF001
            for name, t in store.items():
                if t is None or not t.is_meta:
                    continue
                key = key_of(t)
                if key not in made:
                    made[key] = as_parameter(t, make(t))
                store[name] = made[key]  # type: ignore[assignment]
