"""What an engine's post-processing did to a module, wherever it keeps it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
from torch import nn

from weightsync_server.receiver.kernel import fingerprint, key_of, own_tensors, reachable, same_form

#: types of plain values
SCALARS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
#: where a module keeps its tensors and children
SLOTS = frozenset({"_parameters", "_buffers", "_modules"})


@dataclass(frozen=True)
class Changes:
    """What post-processing did to a module.

    Attributes:
        params: Parameters and buffers that are new, gone, or have another form or other bytes.
        tensors: Attributes that are tensors and were set or rewritten.
        values: Attributes that are plain values, were set, and differ from the live module's.
        objects: Attributes that are neither tensors nor plain values and were set.
        hidden: State that the module does not own itself, and that changed: of its submodules,
            of its quantisation method, inside of objects that it had before.
    """

    params: frozenset[str]
    tensors: frozenset[str]
    values: frozenset[str]
    objects: frozenset[str]
    hidden: frozenset[str]

    @property
    def none(self) -> bool:
        """Whether the module is as it was loaded."""
        return not (self.params or self.tensors or self.values or self.objects or self.hidden)


def same_changes(a: Changes, b: Changes) -> bool:
    """Whether the same things were changed, whatever values came out."""
    return replace(a, values=frozenset()) == replace(b, values=frozenset())


def attributes(module: nn.Module) -> dict[str, Any]:
    """Attributes of a module that are no parameters, buffers or children."""
    return {k: v for k, v in module.__dict__.items() if k not in SLOTS}


def apart(t: torch.Tensor) -> torch.Tensor:
    """A copy in memory of its own; a meta tensor has none, and stays."""
    return t if t.is_meta else t.detach().clone()


class Before:
    """A loaded copy as it was before post-processing; it keeps what it remembers alive."""

    def __init__(self, loaded: nn.Module, *, unwatched: Collection[str]) -> None:
        self._own = own_tensors(loaded)
        self._plain = attributes(loaded)
        # finishing may write to them in place, so what they were is kept: not as copies, since
        # an engine that serves has little memory left
        self._was = {n: fingerprint(t) for n, t in self._own.items() if n not in unwatched}
        self._was_plain = {k: fingerprint(v) for k, v in self._plain.items() if _is_data(v)}
        self._below = _below(loaded)
        self._inside = _inside(loaded)
        self._method = dict(vars(getattr(loaded, "quant_method", None) or _NOTHING))

    def changes(self, after: nn.Module, live: nn.Module) -> Changes:
        """Compare with the module after ``finish``."""
        own, plain = own_tensors(after), attributes(after)
        params = {
            name
            for name in self._own.keys() | own.keys()
            if name not in self._own or name not in own or self._rewritten(name, own[name])
        }
        fresh = {k: v for k, v in plain.items() if k not in self._plain or self._set(k, v)}
        fresh.pop("quant_method", None)
        tensors = {k for k, v in fresh.items() if isinstance(v, torch.Tensor)}
        scalars = {k for k, v in fresh.items() if isinstance(v, SCALARS)}
        values = {k for k in scalars if live.__dict__.get(k, _NOTHING) != fresh[k]}
        hidden = self._plain.keys() - plain.keys() & live.__dict__.keys()
        hidden |= {f"submodule {key}" for key in _differing(self._below, _below(after))}
        inside = _inside(after)
        hidden |= {
            key
            for key in _differing(self._inside, inside)
            if key in self._inside and key in inside and self._inside[key][0] is inside[key][0]
        }
        storages = {key_of(t) for t in own.values() if t.numel()}
        for key, value in vars(getattr(after, "quant_method", None) or _NOTHING).items():
            if self._method.get(key, _NOTHING) is not value and any(
                t.numel() > 1 and not t.is_meta and key_of(t) not in storages
                for t in reachable(value, 4)
            ):
                hidden.add(f"quant_method.{key}")
        return Changes(
            frozenset(params),
            frozenset(tensors),
            frozenset(values),
            frozenset(fresh.keys() - tensors - scalars),
            frozenset(hidden),
        )

    def _set(self, key: str, value: object) -> bool:
        if self._plain[key] is not value:
            return True
        return _is_data(value) and fingerprint(value) != self._was_plain[key]

    def _rewritten(self, name: str, now: torch.Tensor) -> bool:
        old = self._own[name]
        if name in self._was:
            return fingerprint(now) != self._was[name]
        return now is not old and (now.data_ptr() != old.data_ptr() or not same_form(now, old))


class _Nothing:
    """Has no attributes and equals nothing else."""


_NOTHING = _Nothing()


def _is_data(value: object) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor) and not value.is_meta


def _below(module: nn.Module) -> dict[str, tuple[Any, int]]:
    """What the submodules hold, by path: objects, and how often each tensor was rewritten."""
    found: dict[str, tuple[Any, int]] = {}
    for path, child in module.named_modules():
        if child is not module:
            found[path] = (child, 0)
            for slot in (attributes(child), child._parameters, child._buffers):  # noqa: SLF001
                for key, value in slot.items():
                    found[f"{path}.{key}"] = (value, getattr(value, "_version", 0))
    return found


def _inside(module: nn.Module) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Tensors inside of the module's own objects, and of its quantisation method's."""
    method = getattr(module, "quant_method", None) or _NOTHING
    held = {k: v for k, v in attributes(module).items() if k != "quant_method"}
    held |= {f"quant_method.{k}": v for k, v in vars(method).items()}
    return {
        key: (value, tuple(_Held(t, t._version) for t in reachable(value, 2)))  # noqa: SLF001
        for key, value in held.items()
        if not isinstance(value, (torch.Tensor, nn.Module, *SCALARS))
    }


@dataclass(frozen=True, eq=False)
class _Held:
    """A tensor that an object refers to, and how often it was rewritten."""

    tensor: torch.Tensor
    version: int

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Held)
            and self.tensor is other.tensor
            and self.version == other.version
        )

    __hash__ = object.__hash__


def _differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
    """Keys of what is another object now, or was rewritten."""
    return {
        key
        for key in before.keys() | after.keys()
        if key not in before
        or key not in after
        or before[key][0] is not after[key][0]
        or before[key][1] != after[key][1]
    }
