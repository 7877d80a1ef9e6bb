"""What staged modules served with, kept for a rollback: post-processing replaces it at commit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from weightsync_server.receiver.changes import SLOTS
from weightsync_server.receiver.kernel import own_tensors
from weightsync_server.receiver.proof import Prover
from weightsync_server.receiver.units import Unit

_ABSENT = object()
_Key = tuple[int, tuple[int, ...], torch.dtype]


class Kept:
    """The tensors, values and objects of some modules as they were.

    A tensor that commit writes in place is copied; an object that it replaces is held on to.  The
    copies' memory is used again from push to push.
    """

    def __init__(self) -> None:
        self._modules: list[_Module] = []
        self._copies: dict[_Key, torch.Tensor] = {}

    @torch.no_grad()
    def copy(self, prover: Prover, units: Sequence[Unit]) -> None:
        """Copy what a commit may write in place.  Nothing is changed: the modules may serve."""
        old, self._copies = self._copies, {}
        self._modules = [_Module(prover, unit) for unit in units]
        for t in (t for module in self._modules for t in module.tensors):
            if _key(t) not in self._copies:
                copy = old.pop(_key(t), None)
                self._copies[_key(t)] = (torch.empty_like(t) if copy is None else copy).copy_(t)

    def note(self) -> None:
        """The engine is paused: remember what a commit may replace."""
        for module in self._modules:
            module.note()

    def settle(self) -> None:
        """The commit is over: what the engine replaces from here on is its own."""
        for module in self._modules:
            module.settle()

    @torch.no_grad()
    def put_back(self) -> None:
        """Make the modules what they were, in place where commit wrote in place."""
        for module in self._modules:
            module.put_back()
            for t in module.tensors:
                t.copy_(self._copies[_key(t)])

    @property
    def nbytes(self) -> int:
        """Bytes that the copies take."""
        return sum(t.numel() * t.element_size() for t in self._copies.values())

    def clear(self) -> None:
        """Let go of it all."""
        self._modules, self._copies = [], {}


class _Module:
    """One module: what it refers to, and which of its tensors a commit may write in place."""

    def __init__(self, prover: Prover, unit: Unit) -> None:
        live = prover.adapter.live.get_submodule(unit.path)
        stores: list[Any] = [live._parameters, live._buffers, live.__dict__]  # noqa: SLF001
        self._places: list[dict[str, Any]] = stores
        self._noted: list[dict[str, Any]] | None = None
        self._changed: list[dict[str, Any]] = []
        held = [*own_tensors(live).values(), *(live.__dict__.get(k) for k in unit.derived)]
        self.tensors = [
            t.data for t in held if isinstance(t, torch.Tensor) and t.numel() and not t.is_meta
        ]

    def note(self) -> None:
        self._noted = [dict(place) for place in self._places]

    def settle(self) -> None:
        if self._noted is None:
            return
        for place, was in zip(self._places, self._noted, strict=True):
            self._changed.append(
                {
                    name: was.get(name, _ABSENT)
                    for name in place.keys() | was.keys() - SLOTS
                    if place.get(name, _ABSENT) is not was.get(name, _ABSENT)
                }
            )
        self._noted = None

    def put_back(self) -> None:
        self.settle()
        for place, changed in zip(self._places, self._changed, strict=False):
            for name, was in changed.items():
                if was is _ABSENT:
                    place.pop(name, None)
                else:
                    place[name] = was


def _key(t: torch.Tensor) -> _Key:
    return t.data_ptr(), tuple(t.shape), t.dtype


def kept_nbytes(prover: Prover, units: Sequence[Unit]) -> int:
    """Bytes that :meth:`Kept.copy` of these units takes."""
    tensors = {_key(t): t for unit in units for t in _Module(prover, unit).tensors}
    return sum(t.numel() * t.element_size() for t in tensors.values())
