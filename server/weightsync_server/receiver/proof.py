"""Decide and prove, for every kernel tensor, how bytes may reach it: direct, staged or refused.

A *unit* is a module that owns loaded parameters.  Three things can be true of it:

- ``direct``: the live parameters hold the load format, byte for byte, and post-processing leaves
  nothing else behind.  Writes may land in the live storage.
- ``renewed``: as direct, but post-processing also made something from the weights (a packed copy
  beside the plain one).  Writes land in the live storage; commit makes the rest again.
- ``staged``: the live parameters have another form.  Writes land in a buffer in load format;
  commit runs the engine's own post-processing on it.

Nothing of this is believed: the live bytes are compared with a load that the engine made (WS-11).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from weightsync.layout import Mode
from weightsync_server.engines.base import EngineAdapter
from weightsync_server.receiver.install import Changes, finished_copy, obstacle
from weightsync_server.receiver.kernel import replay, same_bytes, tensor_at, view, windows
from weightsync_server.receiver.tracer import TracedCopy

Source = Callable[[str], torch.Tensor]
_WINDOW_NBYTES = 64 * 1024
_READ_BACK_COLUMNS = 16


@dataclass(slots=True)
class Unit:
    """A module with loaded parameters: its own names for them, and the kernel tensors' names."""

    path: str
    params: dict[str, str]
    kind: Literal["direct", "renewed", "staged"] = "direct"


@dataclass(slots=True)
class Proofs:
    """What was found out about a live model.

    ``units`` in module order; ``refusals`` by kernel tensor.
    """

    units: list[Unit] = field(default_factory=list)
    refusals: dict[str, str] = field(default_factory=dict)

    def mode(self, tensor: str) -> Mode:
        """How bytes reach a kernel tensor."""
        if tensor in self.refusals:
            return "refused"
        kinds = {u.kind for u in self.units if tensor in u.params.values()}
        return "staged" if "staged" in kinds or not kinds else "direct"


class Prover:
    """Looks at one live model; keeps a pristine twin of it.

    Args:
        adapter: The engine.
    """

    def __init__(self, adapter: EngineAdapter) -> None:
        self.adapter = adapter
        self.twin = adapter.new_twin()
        names: dict[int, str] = {}
        for name, t in [*self.twin.named_parameters(), *self.twin.named_buffers()]:
            if t.is_meta:
                names.setdefault(int(t.untyped_storage()._cdata), name)
        self._owned: dict[str, dict[str, str]] = {}
        for path, module in self.twin.named_modules():
            own = {**module._parameters, **module._buffers}  # noqa: SLF001
            found = {
                leaf: names[int(t.untyped_storage()._cdata)]
                for leaf, t in own.items()
                if t is not None and t.is_meta
            }
            if found:
                self._owned[path] = found

    def load_format(self, tensor: str) -> torch.Tensor:
        """The twin's meta tensor: shape and dtype in load format."""
        found = tensor_at(self.twin, tensor)
        assert found is not None
        return found

    def empty(self, tensor: str) -> torch.Tensor:
        """A zeroed buffer in load format on the engine's device."""
        like = self.load_format(tensor)
        return torch.zeros(like.shape, dtype=like.dtype, device=self.adapter.device)

    def finished(
        self, unit: Unit, tensors: Mapping[str, torch.Tensor]
    ) -> tuple[nn.Module, Changes, nn.Module]:
        """(finished copy, what finishing changed, live module); ``tensors`` by kernel tensor."""
        live = self.adapter.live.get_submodule(unit.path)
        twin = self.twin.get_submodule(unit.path)
        own = {leaf: tensors[name] for leaf, name in unit.params.items()}
        with torch.no_grad():
            made, changed = finished_copy(self.adapter, twin, own, live)
        return made, changed, live

    def prove(
        self, copies: Mapping[str, Sequence[TracedCopy]], source: Source, *, full: bool
    ) -> Proofs:
        """Compare the live model with the load that ``copies`` of ``source`` describe.

        Args:
            copies: By kernel tensor, what the engine's loader copies into it.
            source: Checkpoint tensors by name, flat and contiguous.
            full: Compare every byte, not windows of every copy.
        """
        proofs = self.guess(copies)
        for unit in proofs.units:
            if unit.kind != "staged" and not all(
                self._holds(name, copies[name], source, full=full) for name in unit.params.values()
            ):
                unit.kind = "staged"
        _settle(proofs.units)
        for unit in proofs.units:
            if unit.kind != "direct":
                self._prove_finish(unit, copies, source, proofs, full=full)
        self._refuse_shared(proofs)
        return proofs

    def guess(self, copies: Mapping[str, Sequence[TracedCopy]]) -> Proofs:
        """Units by form alone: what finishing zeros does to each of them.  Proves nothing."""
        proofs = Proofs()
        for path, owned in self._owned.items():
            loaded = {leaf: name for leaf, name in owned.items() if name in copies}
            if not loaded:
                continue
            unit = Unit(path, loaded)
            proofs.units.append(unit)
            missing = [n for n in loaded.values() if tensor_at(self.adapter.live, n) is None]
            if missing:
                unit.kind = "staged"
            made, changed, live = self.finished(unit, {n: self.empty(n) for n in loaded.values()})
            reason = obstacle(live, made, changed, replaceable=self.adapter.replaceable)
            if reason:
                proofs.refusals.update(dict.fromkeys(loaded.values(), f"{path}: {reason}"))
            if changed.params & loaded.keys() or not all(
                self._same_form(n) for n in loaded.values()
            ):
                unit.kind = "staged"
            elif not changed.none:
                unit.kind = "renewed"
        _settle(proofs.units)
        return proofs

    def _same_form(self, tensor: str) -> bool:
        live, like = tensor_at(self.adapter.live, tensor), self.load_format(tensor)
        return (
            live is not None
            and live.shape == like.shape
            and live.dtype == like.dtype
            and live.is_contiguous()
            and live.device == self.adapter.device
        )

    def _holds(
        self, tensor: str, copies: Sequence[TracedCopy], source: Source, *, full: bool
    ) -> bool:
        """Whether the live tensor holds what the copies say, in load format."""
        live = tensor_at(self.adapter.live, tensor)
        assert live is not None
        flat = live.detach().reshape(-1)
        for c in copies:
            for w in [c] if full else windows(c, live.element_size(), _WINDOW_NBYTES):
                want = view(source(w.tensor), w.src).to(device=live.device, dtype=live.dtype)
                if not same_bytes(view(flat, w.dst), want.expand(w.dst.shape)):
                    return False
        return True

    def _prove_finish(
        self,
        unit: Unit,
        copies: Mapping[str, Sequence[TracedCopy]],
        source: Source,
        proofs: Proofs,
        *,
        full: bool,
    ) -> None:
        """Post-process a copy loaded from ``source``; refuse unless that is what serves now."""
        tensors = {}
        for name in unit.params.values():
            tensors[name] = self.empty(name)
            replay(copies[name], source, tensors[name])
        made, changed, live = self.finished(unit, tensors)
        reason = obstacle(live, made, changed, replaceable=self.adapter.replaceable)
        reason = reason or self._differs(unit, made, live, changed, tensors, full=full)
        if reason:
            proofs.refusals.update(
                dict.fromkeys(unit.params.values(), f"{unit.path or 'the model'}: {reason}")
            )

    def _differs(
        self,
        unit: Unit,
        made: nn.Module,
        live: nn.Module,
        changed: Changes,
        tensors: Mapping[str, torch.Tensor],
        *,
        full: bool,
    ) -> str:
        """What a finished copy has other than the live module; empty if nothing."""
        for leaf in {*unit.params, *changed.params}:
            ours, theirs = tensor_at(made, leaf), tensor_at(live, leaf)
            if ours is None or theirs is None or not same_bytes(ours, theirs):
                return (
                    f"post-processing a fresh load makes another {leaf} than the engine serves with"
                )
        for leaf in changed.tensors:
            ours, theirs = made.__dict__[leaf], live.__dict__.get(leaf)
            if not isinstance(theirs, torch.Tensor) or not same_bytes(ours, theirs):
                return (
                    f"post-processing a fresh load makes another {leaf} than the engine serves with"
                )
        opaque = bool(changed.objects)
        for leaf, name in unit.params.items():
            served = tensor_at(live, leaf)
            emptied = served is not None and not served.numel() and tensors[name].numel()
            if not (opaque or emptied) or tensors[name].ndim != 2:
                if emptied:
                    return f"{leaf} is emptied by post-processing and cannot be read back"
                continue
            k = tensors[name].shape[1]
            count = k if full else min(k, _READ_BACK_COLUMNS)
            columns = torch.linspace(0, k - 1, count, device=self.adapter.device).long()
            want = tensors[name][:, columns]
            for which, module in (("the engine", live), ("a fresh load", made)):
                got = self.adapter.read_back(module, leaf, columns, k)
                if got is None:
                    if emptied:
                        return f"{leaf} is emptied by post-processing and cannot be read back"
                elif not torch.equal(got, want):
                    return f"{which} computes with another {leaf} than its checkpoint holds"
        return ""

    def _refuse_shared(self, proofs: Proofs) -> None:
        """Refuse tensors that load apart and live in the same memory (re-tied embeddings)."""
        live = self.adapter.live
        seen: dict[int, str] = {}
        for unit in proofs.units:
            for name in unit.params.values():
                t = tensor_at(live, name)
                if t is None or not t.numel():
                    continue
                other = seen.setdefault(t.data_ptr(), name)
                if other != name:
                    reason = f"{name} and {other} share memory in the live engine, and load apart"
                    proofs.refusals.update({name: reason, other: reason})


def _settle(units: Sequence[Unit]) -> None:
    """A tensor is staged for all modules that own it; a module is staged with all its tensors."""
    changed = True
    while changed:
        staged = {name for u in units if u.kind == "staged" for name in u.params.values()}
        late = [u for u in units if u.kind != "staged" and staged & set(u.params.values())]
        for unit in late:
            unit.kind = "staged"
        changed = bool(late)
