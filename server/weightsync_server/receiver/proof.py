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

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Literal

import torch
from torch import nn

from weightsync.errors import LayoutError
from weightsync.layout import Mode
from weightsync_server.engines.base import EngineAdapter
from weightsync_server.receiver.install import Finished, finished_copy, obstacle
from weightsync_server.receiver.kernel import (
    own_tensors,
    replay,
    same_bytes,
    same_form,
    tensor_at,
    view,
    windows,
)
from weightsync_server.receiver.regions import TracedCopy
from weightsync_server.receiver.watch import reachable

Source = Callable[[str], torch.Tensor]
_WINDOW_NBYTES = 64 * 1024
_READ_BACK_COLUMNS = 16
_PROBE_NUMEL = 4099  # a prime: no row is as long, so rows differ


@dataclass(slots=True)
class Unit:
    """A module with loaded parameters: its own names for them, and the kernel tensors' names.

    ``derived``: attributes that are tensors which post-processing makes.  ``opaque``: it makes
    objects whose state no tensor shows.
    """

    path: str
    params: dict[str, str]
    kind: Literal["direct", "renewed", "staged"] = "direct"
    derived: frozenset[str] = frozenset()
    opaque: bool = False


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
        """The twin's meta tensor: shape and dtype in load format.

        Raises:
            LayoutError: The engine has no such tensor.
        """
        found = tensor_at(self.twin, tensor)
        if found is None:
            raise LayoutError(
                f"the engine has no tensor {tensor}", hint="attach to the engine again"
            )
        return found

    def tensors(self) -> set[str]:
        """Names of all tensors that a load could fill."""
        return {name for owned in self._owned.values() for name in owned.values()}

    def empty(self, tensor: str) -> torch.Tensor:
        """A zeroed buffer in load format on the engine's device."""
        like = self.load_format(tensor)
        return torch.zeros(like.shape, dtype=like.dtype, device=self.adapter.device)

    def finished(
        self, unit: Unit, tensors: Mapping[str, torch.Tensor], *, share: bool = False
    ) -> tuple[Finished, nn.Module]:
        """A finished copy and the live module; ``tensors`` by kernel tensor.

        Raises:
            LayoutError: The engine's post-processing failed.
        """
        live = self.adapter.live.get_submodule(unit.path)
        twin = self.twin.get_submodule(unit.path)
        own = {leaf: tensors[name] for leaf, name in unit.params.items()}
        try:
            with torch.no_grad():
                return finished_copy(self.adapter, twin, own, live, share=share), live
        except Exception as error:
            raise LayoutError(
                f"post-processing a copy of {unit.path or 'the model'} fails: "
                f"{type(error).__name__}: {error}",
                hint="this module cannot be pushed; the engine's log may tell more",
            ) from error

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
            if unit.kind != "direct" and not proofs.refusals.keys() & set(unit.params.values()):
                self._prove_finish(unit, copies, source, proofs, full=full)
        return proofs

    def guess(self, copies: Mapping[str, Sequence[TracedCopy]]) -> Proofs:
        """Units by form alone: what finishing a probe does to each of them.  Proves nothing."""
        proofs = Proofs()
        for unit in self.units(copies):
            proofs.units.append(unit)
            names = unit.params.values()
            try:
                made, live = self.finished(unit, {n: self._probe(n) for n in names})
            except LayoutError as error:
                unit.kind = "staged"
                proofs.refusals.update(dict.fromkeys(names, error.message))
                continue
            changed = made.changes
            unit.derived, unit.opaque = changed.tensors, bool(changed.objects)
            reason = obstacle(live, made, replaceable=self.adapter.replaceable)
            if reason:
                where = unit.path or "the model"
                proofs.refusals.update(dict.fromkeys(names, f"{where}: {reason}"))
            if changed.params & unit.params.keys() or not all(
                self._same_place(live, leaf, name) for leaf, name in unit.params.items()
            ):
                unit.kind = "staged"
            elif not changed.none:
                unit.kind = "renewed"
        _settle(proofs.units)
        self._refuse_shared(proofs)
        return proofs

    def units(self, loaded: Collection[str] | None = None) -> list[Unit]:
        """Modules that own kernel tensors; only those in ``loaded``, where it is given."""
        found = []
        for path, owned in self._owned.items():
            params = {k: n for k, n in owned.items() if loaded is None or n in loaded}
            if params:
                found.append(Unit(path, params))
        return found

    def _probe(self, tensor: str) -> torch.Tensor:
        """A buffer in load format in which a reordering, or a scale made from it, shows."""
        probe = self.empty(tensor)
        flat = probe.view(-1)
        if flat.dtype.is_floating_point:
            i = torch.arange(min(_PROBE_NUMEL, flat.numel()), dtype=torch.float32)
            # two incommensurable steps: no two of them are alike at any power-of-two distance
            block = (torch.frac(i * 0.6180339887) - 0.5) * torch.exp2(torch.frac(i * 0.7548776662))
        else:
            block = (torch.arange(min(_PROBE_NUMEL, flat.numel())) * 40503 >> 4) % 2
        if flat.dtype == torch.float8_e8m0fnu:  # a bare exponent: there is no sign
            block = block.abs()
        block = block.to(device=flat.device).to(flat.dtype)
        for start in range(0, flat.numel(), _PROBE_NUMEL):
            part = flat[start : start + _PROBE_NUMEL]
            part.copy_(block[: part.numel()])
        return probe

    def _same_place(self, module: nn.Module, leaf: str, tensor: str) -> bool:
        """Whether a live module's tensor is the kernel tensor itself, in load format."""
        live, like = tensor_at(self.adapter.live, tensor), self.load_format(tensor)
        mine = own_tensors(module).get(leaf)
        return (
            live is not None
            and mine is not None
            # tied when loaded, and no more: a write to the one would miss the other
            and mine.data_ptr() == live.data_ptr()
            and same_form(mine, live)
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
        if live is None:
            return False
        flat = live.detach().reshape(-1)
        for c in copies:
            for w in [c] if full else windows(c, live.element_size(), _WINDOW_NBYTES):
                want = view(source(w.tensor), w.src).to(device=live.device, dtype=live.dtype)
                if not same_bytes(view(flat, w.dst), want):
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
        try:
            made, live = self.finished(unit, tensors)
        except LayoutError as error:
            reason = error.message
        else:
            reason = obstacle(live, made, replaceable=self.adapter.replaceable)
            reason = reason or self._differs(unit, made, live, tensors, full=full)
        if reason:
            proofs.refusals.update(
                dict.fromkeys(unit.params.values(), f"{unit.path or 'the model'}: {reason}")
            )

    def _differs(
        self,
        unit: Unit,
        made: Finished,
        live: nn.Module,
        tensors: Mapping[str, torch.Tensor],
        *,
        full: bool,
    ) -> str:
        """What a finished copy has other than the live module; empty if nothing."""
        ours, theirs, changed = made.module, live, made.changes
        pairs = [
            (leaf, own_tensors(ours).get(leaf), own_tensors(theirs).get(leaf))
            for leaf in sorted({*unit.params, *changed.params})
        ] + [(k, ours.__dict__.get(k), theirs.__dict__.get(k)) for k in sorted(changed.tensors)]
        for name, a, b in pairs:
            if a is None and b is None:
                continue
            if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)) or not (
                same_bytes(a, b)
            ):
                return f"post-processing a fresh load makes another {name} than the engine serves"
        if changed.values:
            return (
                f"post-processing a fresh load sets another {', '.join(sorted(changed.values))} "
                "than the engine serves with"
            )
        return self._reads_back(unit, made, live, tensors, full=full)

    def _reads_back(
        self,
        unit: Unit,
        made: Finished,
        live: nn.Module,
        tensors: Mapping[str, torch.Tensor],
        *,
        full: bool,
    ) -> str:
        """What opaque kernels compute with, where it is not the checkpoint; empty if nothing."""
        read = False
        for leaf, name in unit.params.items():
            served = own_tensors(live).get(leaf)
            emptied = (served is None or not served.numel()) and tensors[name].numel() > 0
            if not (made.changes.objects or emptied):
                continue
            unreadable = f"{leaf} is emptied by post-processing and cannot be read back"
            if tensors[name].ndim != 2:
                if emptied:
                    return unreadable
                continue
            k = tensors[name].shape[1]
            count = k if full else min(k, _READ_BACK_COLUMNS)
            columns = torch.linspace(0, k - 1, count, device=self.adapter.device).long()
            want = tensors[name][:, columns]
            for which, module in (("the engine", live), ("a fresh load", made.module)):
                got = self.adapter.read_back(module, leaf, columns, k)
                if got is None:
                    if emptied:
                        return unreadable
                    continue
                read = True
                if not torch.equal(got, want):
                    return f"{which} computes with another {leaf} than its checkpoint holds"
        return "" if read else _objects_differ(made, live)

    def _refuse_shared(self, proofs: Proofs) -> None:
        """Refuse tensors that load apart and share live memory (re-tied embeddings)."""
        spans: dict[tuple[int, int, str], str] = {}
        for unit in proofs.units:
            module = self.adapter.live.get_submodule(unit.path)
            for leaf, name in unit.params.items():
                t = own_tensors(module).get(leaf)
                if t is not None and t.numel() and not t.is_meta:
                    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
                    stop = t.data_ptr() + (last + 1) * t.element_size()
                    spans[t.data_ptr(), stop, name] = name
        reach, owner = 0, ""
        for start, stop, name in sorted(spans):
            if start < reach and name != owner:
                reason = f"{name} and {owner} share memory in the live engine, and load apart"
                proofs.refusals.update({name: reason, owner: reason})
            if stop > reach:
                reach, owner = stop, name


def _objects_differ(made: Finished, live: nn.Module) -> str:
    """Compare the tensors that objects and closures hold on to; empty if they are equal."""
    for key in sorted(made.changes.objects):
        ours = reachable(made.module.__dict__.get(key), 3)
        theirs = reachable(live.__dict__.get(key), 3)
        for a, b in zip_longest(ours, theirs):
            if a is None or b is None or not same_bytes(a, b):
                return f"{key} of a fresh load holds other tensors than the engine's"
    return ""


def _settle(units: Sequence[Unit]) -> None:
    """A tensor is staged for all modules that own it; a module is staged with all its tensors."""
    changed = True
    while changed:
        staged = {name for u in units if u.kind == "staged" for name in u.params.values()}
        late = [u for u in units if u.kind != "staged" and staged & set(u.params.values())]
        for unit in late:
            unit.kind = "staged"
        changed = bool(late)
